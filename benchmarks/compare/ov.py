"""`ov.py FOLDER THREADS`: an OpenVINO model in openvino_genai's pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import openvino
import openvino_genai
from worker import serve


class Listener(openvino_genai.StreamerBase):
    def __init__(self, made: Callable[[int], None]) -> None:
        super().__init__()
        self._made = made

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for each in [token] if isinstance(token, int) else token:
            self._made(int(each))
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino:
    def __init__(self, folder: str, threads: int) -> None:
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(self, ids: Sequence[int], new_tokens: int, made: Callable[[int], None]) -> None:
        options = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        prompt = openvino.Tensor(np.array([ids], dtype=np.int64))
        self._pipeline.generate(prompt, options, Listener(made))


serve(lambda: OpenVino(sys.argv[1], int(sys.argv[2])))

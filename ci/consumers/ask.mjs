// The tokens that transformers.js answers with, about text and a picture.
import { AutoProcessor, Gemma3nForConditionalGeneration, RawImage, env } from "@huggingface/transformers";

const [folder, name, picture] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder; // the folder that the export's folder is in
const processor = await AutoProcessor.from_pretrained(name);
const model = await Gemma3nForConditionalGeneration.from_pretrained(name, { device: "cpu" });

async function ask(content, image = null) {
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = await processor(prompt, image, null, { add_special_tokens: false });
  const whole = await model.generate({ ...inputs, max_new_tokens: 24, do_sample: false });
  return [...whole.slice(null, [inputs.input_ids.dims.at(-1), null]).data];
}

const tokens = [
  await ask([{ type: "text", text: "What is 3 plus 4?" }]),
  await ask([{ type: "image" }, { type: "text", text: "What is in the picture?" }], await RawImage.read(picture)),
];
for (const answer of tokens) console.log(answer.join(" "));

// Each row of a batch that is padded on the left is answered as alone.
processor.tokenizer.padding_side = "left";
const prompts = ["3 plus 4 is", "7 plus 8 is equal to", "What is in the picture? I see a red circle and"];
const generate = (inputs) => model.generate({ ...inputs, max_new_tokens: 8, do_sample: false });
const batch = processor.tokenizer(prompts, { padding: true });
const rows = (await generate(batch)).slice(null, [batch.input_ids.dims.at(-1), null]).tolist();
for (const [index, prompt] of prompts.entries()) {
  const single = processor.tokenizer(prompt);
  const alone = (await generate(single)).slice(null, [single.input_ids.dims.at(-1), null]).tolist()[0];
  if (`${alone}` !== `${rows[index].slice(0, alone.length)}`) throw new Error(`${prompt}: ${rows[index]}, not ${alone}`);
}

/* A CUDA runtime without a GPU: memory is the host's, kernels do nothing, launches and copies are counted.

   ONNX Runtime's own CUDA provider runs on it, so it tells where that provider puts nodes, what it copies and launches,
   and whether it does anything while capturing a graph that CUDA forbids then. What it computes means nothing.
   Functions that are not here are made by dry_run.py and return 0, success. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COMPUTE_CAPABILITY 9
#define MULTIPROCESSORS 132

enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, KINDS = 5 };

static long launches, graph_launches, captures, forbidden, copies[KINDS];
static size_t copied[KINDS];
static int capturing;

long dry_launches(void) { return launches; }
long dry_graph_launches(void) { return graph_launches; }
long dry_captures(void) { return captures; }
long dry_forbidden(void) { return forbidden; }
long dry_copies(int kind) { return copies[kind]; }
size_t dry_copied(int kind) { return copied[kind]; }
void dry_reset(void) {
    launches = graph_launches = captures = 0;
    memset(copies, 0, sizeof copies);
    memset(copied, 0, sizeof copied);
}

static int not_while_capturing(void) {
    forbidden += capturing;
    return 0;
}
static int launch(void) {
    launches++;
    return 0;
}
static int copy(void *to, const void *from, size_t bytes, int kind) {
    copies[kind]++;
    copied[kind] += bytes;
    memmove(to, from, bytes);
    return 0;
}
static int allocate(void **to, size_t bytes) {
    not_while_capturing();
    *to = bytes ? aligned_alloc(256, (bytes + 255) / 256 * 256) : 0;
    return *to || !bytes ? 0 : 2;
}
static int give_back(void *memory) {
    not_while_capturing();
    free(memory);
    return 0;
}
static int handle(void **to) {
    *to = (void *)0x1000;
    return 0;
}

int cudaMalloc(void **to, size_t bytes) { return allocate(to, bytes); }
int cudaMallocHost(void **to, size_t bytes) { return allocate(to, bytes); }
int cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return allocate(to, bytes); }
int cudaMallocFromPoolAsync(void **to, size_t bytes, void *pool, void *stream) { return allocate(to, bytes); }
int cudaFree(void *memory) { return give_back(memory); }
int cudaFreeHost(void *memory) { return give_back(memory); }
int cudaFreeAsync(void *memory, void *stream) { return give_back(memory); }

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    not_while_capturing();
    return copy(to, from, bytes, kind);
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    if (kind != DEVICE_TO_DEVICE) not_while_capturing();
    return copy(to, from, bytes, kind);
}
int cudaMemset(void *to, int value, size_t bytes) {
    not_while_capturing();
    memset(to, value, bytes);
    return 0;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    memset(to, value, bytes);
    return 0;
}

int cudaLaunchKernel(const void *kernel) { return launch(); }
int __cudaLaunchKernel(const void *kernel) { return launch(); }
int cudaLaunchKernelExC(const void *config) { return launch(); }
int cudaLaunchCooperativeKernel(const void *kernel) { return launch(); }
void **__cudaRegisterFatBinary(void *binary) {
    static void *registered;
    return &registered;
}

int cudaStreamBeginCapture(void *stream, int mode) {
    capturing = 1;
    captures++;
    return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    capturing = 0;
    return handle(graph);
}
int cudaStreamIsCapturing(void *stream, int *status) {
    *status = capturing;
    return 0;
}
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return handle(executable); }
int cudaGraphLaunch(void *executable, void *stream) {
    graph_launches++;
    return 0;
}
int cudaStreamSynchronize(void *stream) { return not_while_capturing(); }
int cudaEventSynchronize(void *event) { return not_while_capturing(); }
int cudaDeviceSynchronize(void) { return not_while_capturing(); }

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
    *milliseconds = 1;
    return 0;
}

int cudaGetDeviceCount(int *count) {
    *count = 1;
    return 0;
}
int cudaGetDevice(int *device) {
    *device = 0;
    return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)80 << 30;
    return 0;
}
int cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
int cudaPointerGetAttributes(void *attributes, const void *pointer) {
    memset(attributes, 0, 32);
    *(int *)attributes = 2; /* memory of a device */
    return 0;
}
int cudaFuncGetAttributes(void *attributes, const void *kernel) {
    memset(attributes, 0, 64);
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
    *blocks = 2;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;               /* threads of a block */
        case 10: *value = 32; break;                /* threads of a warp */
        case 16: *value = MULTIPROCESSORS; break;
        case 39: *value = 2048; break;              /* threads of a multiprocessor */
        case 75: *value = COMPUTE_CAPABILITY; break;
        case 76: *value = 0; break;
        case 81: *value = 228 << 10; break;         /* shared memory of a multiprocessor */
        case 97: *value = 227 << 10; break;         /* shared memory of a block, on request */
        default: *value = 1;
    }
    return 0;
}

/* The beginning of cudaDeviceProp as CUDA 13 has it. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_memory_of_block;
    int registers_of_block, warp;
    size_t pitch;
    int threads_of_block, threads[3], grid[3];
    size_t constant_memory;
    int major, minor;
    size_t alignment, pitch_alignment;
    int multiprocessors;
};
int cudaGetDeviceProperties(struct properties *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "none");
    of->total_memory = (size_t)80 << 30;
    of->shared_memory_of_block = 48 << 10;
    of->registers_of_block = 65536;
    of->warp = 32;
    of->threads_of_block = 1024;
    of->constant_memory = 65536;
    of->major = COMPUTE_CAPABILITY;
    of->multiprocessors = MULTIPROCESSORS;
    for (int i = 0; i < 3; i++) of->threads[i] = 1024, of->grid[i] = 2147483647;
    return 0;
}

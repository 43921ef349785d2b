/* A GPU that computes nothing: what PyTorch calls of the CUDA runtime, the driver, cuBLAS and NCCL.
 *
 * It hands out host memory as device memory, does copies, refuses launches that no card takes, counts
 * what it is asked for, and runs no kernel. All of PyTorch's own host code is the real one. Loaded by
 * LD_PRELOAD, and found as libcuda.so.1 by those who open the driver by name. build.py makes it, and
 * adds a function that returns 0 for whatever else PyTorch's libraries want to link with.
 *
 * NULL_GPU names the card, see ``cards``; NULL_GPU_COUNT how many there are; NULL_GPU_GIB their memory,
 * if not the card's own. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "driver_types.h"

typedef struct { unsigned x, y, z; } Size3;

/* ------------------------------------------------------------------------------------- the card */

typedef struct {
    const char *key, *name;
    int capability;          /* 90 is compute capability 9.0 */
    double gib;
    int multiprocessors, threads_each;
    int shared_bytes;        /* that a block may ask for */
} Card;

static const Card cards[] = {
    {"h100", "NVIDIA H100 80GB HBM3", 90, 79.2, 132, 2048, 232448},
    {"a100", "NVIDIA A100-SXM4-80GB", 80, 79.2, 108, 2048, 166912},
    {"5090", "NVIDIA GeForce RTX 5090", 120, 31.4, 170, 1536, 101376},
    {"4090", "NVIDIA GeForce RTX 4090", 89, 23.6, 128, 1536, 101376},
    {"3090", "NVIDIA GeForce RTX 3090", 86, 23.7, 82, 1536, 101376},
    {"v100", "Tesla V100-SXM2-16GB", 70, 15.8, 80, 2048, 98304},
    {"t4", "Tesla T4", 75, 14.8, 40, 1024, 65536},
    {"2080ti", "NVIDIA GeForce RTX 2080 Ti", 75, 10.8, 68, 1024, 65536},
};

static const Card *card(void) {
    const char *key = getenv("NULL_GPU");
    for (size_t i = 0; key && i < sizeof cards / sizeof *cards; i++)
        if (!strcmp(cards[i].key, key)) return &cards[i];
    return &cards[0];
}

static int num_devices(void) { const char *n = getenv("NULL_GPU_COUNT"); return n ? atoi(n) : 1; }

static size_t total_bytes(void) {
    const char *gib = getenv("NULL_GPU_GIB");
    return (size_t)((gib ? atof(gib) : card()->gib) * (1u << 30));
}

static size_t context_bytes(void) { return 500u << 20; }  /* what a process takes before it starts */

/* ------------------------------------------------------------------------------------- counting */

typedef struct Count { char *name; long calls; double work; struct Count *next; } Count;
static Count *counts;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void count(const char *name, double work) {
    pthread_mutex_lock(&lock);
    Count *c = counts;
    while (c && strcmp(c->name, name)) c = c->next;
    if (!c) { c = calloc(1, sizeof *c); c->name = strdup(name); c->next = counts; counts = c; }
    c->calls++;
    c->work += work;
    pthread_mutex_unlock(&lock);
}

void null_gpu_reset(void) {
    pthread_mutex_lock(&lock);
    for (Count *c = counts; c; c = c->next) { c->calls = 0; c->work = 0; }
    pthread_mutex_unlock(&lock);
}

/* A line for each name: calls, bytes or operations, name. */
void null_gpu_write(const char *path) {
    FILE *file = fopen(path, "w");
    pthread_mutex_lock(&lock);
    for (Count *c = counts; c; c = c->next)
        if (c->calls) fprintf(file, "%ld\t%.0f\t%s\n", c->calls, c->work, c->name);
    pthread_mutex_unlock(&lock);
    fclose(file);
}

/* ------------------------------------------------------------------------------------ the device */

static __thread int device, last_error;
static int failed(int error) { last_error = error; return error; }

int cudaGetLastError(void) { int e = last_error; last_error = 0; return e; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "null GPU: invalid call"; }
const char *cudaGetErrorName(int e) { return e == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorNullGpu"; }
int cudaGetDeviceCount(int *n) { *n = num_devices(); return 0; }
int cudaGetDevice(int *d) { *d = device; return 0; }
int cudaSetDevice(int d) { if (d < 0 || d >= num_devices()) return failed(101); device = d; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaDeviceCanAccessPeer(int *yes, int a, int b) { *yes = 1; return 0; }
int cudaDeviceGetPCIBusId(char *s, int length, int d) { snprintf(s, length, "0000:0%d:00.0", d); return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}

static int attribute(int which) {  /* enum cudaDeviceAttr */
    const Card *c = card();
    switch (which) {
        case 1: case 2: case 3: return 1024;      /* threads of a block, in all and by x and y */
        case 4: return 64;                        /* by z */
        case 5: return 2147483647;                /* blocks by x */
        case 6: case 7: return 65535;             /* by y and z */
        case 8: return 49152;                     /* shared memory without asking for more */
        case 9: case 12: case 82: return 65536;   /* constant memory, registers */
        case 10: return 32;                       /* threads of a warp */
        case 13: return 1980000;                  /* clock, kHz */
        case 16: return c->multiprocessors;
        case 36: return 2619000;                  /* memory clock, kHz */
        case 37: return 5120;                     /* memory bus, bits */
        case 38: return 50 << 20;                 /* level 2 cache */
        case 39: return c->threads_each;
        case 75: return c->capability / 10;
        case 76: return c->capability % 10;
        case 81: return c->shared_bytes + 1024;   /* shared memory of a multiprocessor */
        case 97: return c->shared_bytes;          /* of a block that asks */
        case 14: return 512;                      /* alignment of textures */
        case 41: case 95: return 1;               /* unified addresses, cooperative launch */
        case 106: return 32;                      /* blocks of a multiprocessor */
    }
    return 0;
}
int cudaDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    const Card *c = card();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", c->name);
    p->totalGlobalMem = total_bytes();
    p->major = attribute(75);
    p->minor = attribute(76);
    p->multiProcessorCount = c->multiprocessors;
    p->maxThreadsPerMultiProcessor = c->threads_each;
    p->sharedMemPerBlock = attribute(8);
    p->sharedMemPerBlockOptin = c->shared_bytes;
    p->sharedMemPerMultiprocessor = attribute(81);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->totalConstMem = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = attribute(2 + i);
        p->maxGridSize[i] = attribute(5 + i);
    }
    p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = attribute(38);
    p->memoryBusWidth = attribute(37);
    p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
    return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) { return cudaGetDeviceProperties(p, d); }

/* ----------------------------------------------------------------------------- streams and events */

static uintptr_t next_handle = 4096;
static int new_handle(void **out) { *out = (void *)__sync_add_and_fetch(&next_handle, 16); return 0; }
static int waited(const char *call) { char name[64]; snprintf(name, 64, "WAIT %s", call); count(name, 0); return 0; }

int cudaDeviceSynchronize(void) { return waited(__func__); }
int cudaStreamSynchronize(void *s) { return waited(__func__); }
int cudaEventSynchronize(void *e) { return waited(__func__); }
int cudaStreamCreate(void **s) { return new_handle(s); }
int cudaStreamCreateWithFlags(void **s, unsigned f) { return new_handle(s); }
int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { return new_handle(s); }
int cudaStreamGetPriority(void *s, int *p) { *p = 0; return 0; }
int cudaStreamIsCapturing(void *s, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *s, int *status, unsigned long long *id, void *g, void *d, void *e, size_t *n) {
    *status = 0;
    if (id) *id = 0;
    if (n) *n = 0;
    return 0;
}
int cudaEventCreate(void **e) { return new_handle(e); }
int cudaEventCreateWithFlags(void **e, unsigned f) { return new_handle(e); }
int cudaEventElapsedTime(float *milliseconds, void *a, void *b) { *milliseconds = 1; return 0; }
int cudaLaunchHostFunc(void *s, void (*f)(void *), void *data) { f(data); return 0; }

/* ---------------------------------------------------------------------------------------- memory */

typedef struct Block { void *at; size_t size; int device; struct Block *next; } Block;
static Block *blocks;
static size_t used_bytes[64];

int cudaMalloc(void **out, size_t size) {
    if (used_bytes[device] + size > total_bytes() - context_bytes()) { *out = 0; return failed(2); }
    void *at = mmap(0, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) { *out = 0; return failed(2); }
    Block *b = malloc(sizeof *b);
    pthread_mutex_lock(&lock);
    *b = (Block){at, size, device, blocks};
    blocks = b;
    used_bytes[device] += size;
    pthread_mutex_unlock(&lock);
    *out = at;
    return 0;
}
int cudaFree(void *at) {
    pthread_mutex_lock(&lock);
    for (Block **b = &blocks; at && *b; b = &(*b)->next)
        if ((*b)->at == at) {
            Block *gone = *b;
            *b = gone->next;
            used_bytes[gone->device] -= gone->size;
            munmap(gone->at, gone->size ? gone->size : 1);
            free(gone);
            break;
        }
    pthread_mutex_unlock(&lock);
    return 0;
}
int cudaMallocAsync(void **out, size_t size, void *s) { return cudaMalloc(out, size); }
int cudaFreeAsync(void *at, void *s) { return cudaFree(at); }
int cudaMemGetInfo(size_t *free_bytes, size_t *all) {
    *all = total_bytes();
    *free_bytes = *all - context_bytes() - used_bytes[device];
    return 0;
}
int cudaHostAlloc(void **out, size_t size, unsigned f) { *out = aligned_alloc(4096, (size + 4095) / 4096 * 4096); return 0; }
int cudaFreeHost(void *at) { free(at); return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *at) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    a->device = device;
    pthread_mutex_lock(&lock);
    for (Block *b = blocks; b; b = b->next)
        if ((char *)at >= (char *)b->at && (char *)at < (char *)b->at + b->size) {
            a->type = cudaMemoryTypeDevice;
            a->device = b->device;
            a->devicePointer = (void *)at;
        }
    pthread_mutex_unlock(&lock);
    return 0;
}
static char a_symbol[1 << 20];
int cudaGetSymbolAddress(void **out, const void *s) { *out = a_symbol; return 0; }

static void copy(const char *call, void *to, const void *from, size_t size, int kind) {
    static const char *kinds[] = {"host to host", "host to device", "device to host", "device to device", "default"};
    char name[64];
    snprintf(name, 64, "%s %s", call, kinds[kind]);
    count(name, size);
    if (kind != 3 || size <= 1 << 20) memmove(to, from, size);  /* what a kernel left is nothing anyway */
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { copy("WAIT COPY", to, from, size, kind); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *s) { copy("COPY", to, from, size, kind); return 0; }
static int set(void *at, int value, size_t size) { count("SET", size); if (size <= 1 << 20) memset(at, value, size); return 0; }
int cudaMemset(void *at, int value, size_t size) { return set(at, value, size); }
int cudaMemsetAsync(void *at, int value, size_t size, void *s) { return set(at, value, size); }

/* --------------------------------------------------------------------------------------- kernels */

typedef struct Kernel { const void *host; const char *name; struct Kernel *next; } Kernel;
static Kernel *kernels[1 << 14];

static Kernel *kernel_of(const void *host) {
    Kernel **first = &kernels[((uintptr_t)host >> 4) % (1 << 14)], *k = *first;
    while (k && k->host != host) k = k->next;
    if (!k) { k = malloc(sizeof *k); *k = (Kernel){host, "unknown", *first}; *first = k; }
    return k;
}

static int launch(const char *name, Size3 grid, Size3 block, size_t shared) {
    char text[400];
    snprintf(text, sizeof text, "KERNEL %s", name);
    count(text, 0);
    int fits = grid.x && grid.y && grid.z && block.x && grid.y <= 65535 && grid.z <= 65535
        && block.x * block.y * block.z <= 1024 && shared <= (size_t)attribute(97);
    if (!fits) fprintf(stderr, "null GPU: no card takes %s: grid %u %u %u, block %u %u %u, %zu bytes shared\n",
                       text, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return fits ? 0 : failed(9);
}

void **__cudaRegisterFatBinary(void *code) { return (void **)a_symbol; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterVar() {}
void __cudaRegisterFunction(void **h, const char *host, char *f, const char *name) { kernel_of(host)->name = name; }
int __cudaGetKernel(void **k, const void *host) { *k = kernel_of(host); return 0; }

static __thread struct { Size3 grid, block; size_t shared; void *stream; } pushed;
unsigned __cudaPushCallConfiguration(Size3 grid, Size3 block, size_t shared, void *stream) {
    pushed.grid = grid; pushed.block = block; pushed.shared = shared; pushed.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(Size3 *grid, Size3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid; *block = pushed.block; *shared = pushed.shared; *stream = pushed.stream;
    return 0;
}
int __cudaLaunchKernel(Kernel *k, Size3 grid, Size3 block, void **a, size_t shared, void *s) { return launch(k->name, grid, block, shared); }
int cudaLaunchKernel(const void *f, Size3 grid, Size3 block, void **a, size_t shared, void *s) { return launch(kernel_of(f)->name, grid, block, shared); }
int cudaLaunchCooperativeKernel(const void *f, Size3 grid, Size3 block, void **a, size_t shared, void *s) { return launch(kernel_of(f)->name, grid, block, shared); }
int cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
    Size3 grid = {c->gridDim.x, c->gridDim.y, c->gridDim.z}, block = {c->blockDim.x, c->blockDim.y, c->blockDim.z};
    return launch(kernel_of(f)->name, grid, block, c->dynamicSmemBytes);
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->binaryVersion = a->ptxVersion = card()->capability == 89 ? 86 : card()->capability;
    a->maxDynamicSharedSizeBytes = attribute(97);
    return 0;
}
int cudaFuncSetAttribute(const void *f, int which, int value) { return which == 8 && value > attribute(97) ? failed(1) : 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) { *n = 2; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int t, size_t s, unsigned g) { *n = 2; return 0; }

static int succeed(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *status) {
    void *found = dlsym(RTLD_DEFAULT, name);
    *f = found ? found : (void *)succeed;
    if (status) *status = 0;
    return 0;
}

/* --------------------------------------------------------------------------------- matrix products */

static int product(const char *call, int ta, int tb, long m, long n, long k, long batch, int type) {
    char name[128];
    snprintf(name, 128, "PRODUCT %s %c%c m %ld n %ld k %ld batch %ld type %d", call, "NTC"[ta], "NTC"[tb], m, n, k, batch, type);
    count(name, 2.0 * m * n * k * batch);
    return 0;
}
int cublasCreate_v2(void **h) { return new_handle(h); }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, void *al, void *A, int type) { return product("cublas", ta, tb, m, n, k, 1, type); }
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, void *al, void *A, int type, int la, long long sa,
                               void *B, int tyb, int lb, long long sb, void *be, void *C, int tyc, int lc, long long sc, int batch) {
    return product("cublas", ta, tb, m, n, k, batch, type);
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k) { return product("cublas", ta, tb, m, n, k, 1, 0); }
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, void *al, void *A, int la, long long sa, void *B, int lb,
                              long long sb, void *be, void *C, int lc, long long sc, int batch) {
    return product("cublas", ta, tb, m, n, k, batch, 0);
}

typedef struct { int type; uint64_t rows, columns; int64_t stride; int batch; } Layout;
typedef struct { int transposes[2]; } Description;
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = calloc(1, 256); return 0; }
int cublasLtMatmulDescDestroy(void *d) { free(d); return 0; }
int cublasLtMatmulDescSetAttribute(Description *d, int which, const int *value, size_t size) {
    if (which == 3 || which == 4) d->transposes[which - 3] = *value;
    return 0;
}
int cublasLtMatmulPreferenceCreate(void **p) { *p = calloc(1, 256); return 0; }
int cublasLtMatmulPreferenceDestroy(void *p) { free(p); return 0; }
int cublasLtMatrixLayoutCreate(void **l, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *l = calloc(1, 256);
    *(Layout *)*l = (Layout){type, rows, columns, stride, 1};
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *l) { free(l); return 0; }
int cublasLtMatrixLayoutSetAttribute(Layout *l, int which, const int *value, size_t size) {
    if (which == 5) l->batch = *value;
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *A, void *B, void *C, void *D, void *p, int asked, char *results, int *found) {
    memset(results, 0, 96);  /* one cublasLtMatmulHeuristicResult_t */
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *h, Description *d, void *al, void *a, Layout *A, void *b, Layout *B, void *be, void *c, Layout *C, void *o, Layout *D) {
    long k = d->transposes[0] ? A->rows : A->columns;
    return product("cublasLt", d->transposes[0], d->transposes[1], D->rows, D->columns, k, D->batch, A->type);
}
size_t cublasLtGetVersion(void) { return 130100; }

/* ------------------------------------------------------------------------------------------ NCCL */

typedef struct { char bytes[128]; } UniqueId;
int ncclGetVersion(int *v) { *v = 22809; return 0; }
int ncclGetUniqueId(UniqueId *u) { memset(u, 1, sizeof *u); return 0; }
int ncclCommInitRank(void **c, int n, UniqueId u, int rank) { return new_handle(c); }
int ncclCommInitRankConfig(void **c, int n, UniqueId u, int rank, void *config) { return new_handle(c); }
int ncclCommInitRankScalable(void **c, int n, int rank, int k, void *u, void *config) { return new_handle(c); }
int ncclCommGetAsyncError(void *c, int *e) { *e = 0; return 0; }
const char *ncclGetErrorString(int e) { return "null GPU"; }
const char *ncclGetLastError(void *c) { return ""; }
int ncclAllReduce(void *s, void *r, size_t n, int t, int op, void *c, void *stream) { count("NCCL all-reduce", n); return 0; }

/* ------------------------------------------------------- the driver, as Triton and PyTorch ask it */

#define OK(name) int name() { return 0; }
#define NONE(name) int name() { return 801; }  /* not supported */
OK(cuInit) OK(cuCtxSetCurrent) OK(cuCtxSetLimit) OK(cuModuleUnload) OK(cuFuncSetCacheConfig) OK(cuTensorMapEncodeTiled)
NONE(cuLinkCreate_v2) NONE(cuLinkAddData_v2) NONE(cuLinkComplete)
int cuStreamSynchronize(void *s) { return waited(__func__); }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = num_devices(); return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)16; return 0; }
int cuCtxGetDevice(int *d) { *d = device; return 0; }
int cuCtxGetLimit(size_t *v, int which) { *v = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)16; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "null GPU"; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "null GPU"; return 0; }
int cuModuleLoad(void **m, const char *file) { return new_handle(m); }
int cuModuleLoadData(void **m, const void *code) { return new_handle(m); }
int cuModuleLoadDataEx(void **m, const void *code, unsigned n, void *o, void *v) { return new_handle(m); }
int cuModuleGetFunction(void **f, void *m, const char *name) {  /* the name is all that a launch needs */
    *f = malloc(strlen(name) + 8);
    sprintf(*f, "triton %s", name);
    return 0;
}
int cuFuncGetAttribute(int *v, int which, void *f) { *v = which == 0 ? 1024 : which == 4 ? 64 : 0; return 0; }
int cuKernelGetAttribute(int *v, int which, void *f, int d) { *v = 0; return 0; }
int cuFuncSetAttribute(void *f, int which, int v) { return which == 8 && v > attribute(97); }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int threads, size_t shared) { *n = 2; return 0; }
int cuPointerGetAttribute(void *out, int which, unsigned long long at) {
    if (which == 2) *(int *)out = 2;  /* device memory */
    else *(unsigned long long *)out = at;
    return 0;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *all) { return cudaMemGetInfo(free_bytes, all); }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared) {
    return launch(f, (Size3){gx, gy, gz}, (Size3){bx, by, bz}, shared);
}
int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared) {
    return launch(f, (Size3){gx, gy, gz}, (Size3){bx, by, bz}, shared);
}
typedef struct { Size3 grid, block; unsigned shared; } DriverLaunch;
int cuLaunchKernelEx(const DriverLaunch *c, void *f) { return launch(f, c->grid, c->block, c->shared); }
int cuGetProcAddress_v2(const char *name, void **f, int v, unsigned long long flags, int *status) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *f ? 0 : 1;
    return 0;
}

#include "stubs.h"  /* by build.py */

// A stand-in for libcuda.so.1, so that everything of the runtime but the GPU's own code can be tested without a GPU.
//
// Memory of the "device" is memory of this process at addresses that become usable when they are mapped, so a stray access ends the
// program. Work is queued, and done only when somebody waits: a buffer that is changed too early shows. Kernels are those of the
// processor: a "PTX" text is `PARAMS PATH`, the number of pointers that the kernel takes and the shared library that has it. Only
// kernels of single threads run; real PTX does nothing.
//
// The environment sets what it pretends: STAND_IN_CAPABILITY (90), STAND_IN_MEMORY (bytes), STAND_IN_FAULT (a function whose run
// is an illegal access), STAND_IN_LOG (a file that gets a line for each launch).

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int status;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_PTX = 218, ILLEGAL_ADDRESS = 700 };

enum { GRANULARITY = 2 << 20, MAX_ARGS = 64 };

typedef void (*code)(const uint64_t *args, void *scratch, int64_t first, int64_t last);

typedef struct { void *library; int params; } module;
typedef struct { char name[64]; code run; int params; } function;

typedef struct op {
    enum { COPY, CLEAR, LAUNCH, RECORD } kind;
    void *to;
    const void *from;
    size_t bytes;
    unsigned char value;
    function *f;
    uint64_t args[MAX_ARGS];
    unsigned blocks, early;
} op;

typedef struct { op *ops; size_t count, room; } list;
typedef struct { list queue, captured; int capturing; } stream;
typedef struct { double at; stream *in; } event;

static _Atomic size_t used;
static status broken;
static double now;

static size_t setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static size_t total(void) { return setting("STAND_IN_MEMORY", 1ull << 30); }

static void append(list *l, op o) {
    if (l->count == l->room) {
        l->room = l->room ? 2 * l->room : 64;
        l->ops = realloc(l->ops, l->room * sizeof(op));
    }
    l->ops[l->count++] = o;
}

static status push(stream *s, op o) {
    if (broken) return broken;
    append(s->capturing ? &s->captured : &s->queue, o);
    return OK;
}

static void note(const op *o) {
    const char *path = getenv("STAND_IN_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %u blocks%s\n", o->f->name, o->blocks, o->early ? " early" : "");
    fclose(file);
}

static void run(const op *o) {
    const char *fault = getenv("STAND_IN_FAULT");
    switch (o->kind) {
    case COPY: memcpy(o->to, o->from, o->bytes); break;
    case CLEAR: memset(o->to, o->value, o->bytes); break;
    case RECORD: ((event *)o->to)->at = now += 0.001; break;
    case LAUNCH:
        if (!o->f->run) return;
        note(o);
        if (fault && !strcmp(fault, o->f->name)) { broken = ILLEGAL_ADDRESS; return; }
        uint64_t tasks = o->args[4 + o->f->params + 1];
        void *scratch = (void *)o->args[4 + o->f->params];
        uint64_t args[MAX_ARGS + 1]; // as a CPU's code has them: behind the dimensions the threads of a team
        memcpy(args, o->args, 4 * sizeof *args);
        args[4] = 1;
        memcpy(args + 5, o->args + 4, o->f->params * sizeof *args);
        for (uint64_t t = 0; t < tasks; t++) o->f->run(args, scratch, t, t + 1);
        break;
    }
}

static status drain(stream *s) {
    for (size_t i = 0; i < s->queue.count && !broken; i++) run(&s->queue.ops[i]);
    s->queue.count = 0;
    return broken;
}

status cuInit(unsigned flags) { (void)flags; return setting("STAND_IN_CAPABILITY", 90) ? OK : NO_DEVICE; }
status cuDriverGetVersion(int *v) { *v = (int)setting("STAND_IN_VERSION", 13000); return OK; }
status cuDeviceGetCount(int *n) { *n = 1; return OK; }
status cuDeviceGet(int *d, int i) { *d = i; return OK; }
status cuDeviceGetName(char *name, int n, int d) { (void)d; snprintf(name, n, "stand-in"); return OK; }
status cuDeviceGetAttribute(int *v, int a, int d) {
    (void)d;
    int capability = (int)setting("STAND_IN_CAPABILITY", 90);
    *v = a == 75 ? capability / 10 : a == 76 ? capability % 10 : a == 13 ? 1000000 : a == 16 ? 4 : 1;
    return OK;
}
status cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = &now; return OK; }
status cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return OK; }
static __thread int current;
status cuCtxSetCurrent(void *c) { (void)c; current = 1; return OK; }
status cuGetErrorName(status s, const char **t) { *t = s == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : s == INVALID_PTX ? "CUDA_ERROR_INVALID_PTX" : "CUDA_ERROR"; return OK; }
status cuGetErrorString(status s, const char **t) { *t = s == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error"; return OK; }

status cuMemGetInfo_v2(size_t *free, size_t *all) { *all = total(); *free = *all - used; return OK; }
status cuMemGetAllocationGranularity(size_t *g, const void *p, int o) { (void)p; (void)o; *g = GRANULARITY; return OK; }
status cuMemAddressReserve(uint64_t *at, size_t n, size_t align, uint64_t hint, uint64_t flags) {
    (void)align; (void)hint; (void)flags;
    if (n == 0 || n % GRANULARITY) return INVALID;
    void *p = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *at = (uint64_t)p;
    return p == MAP_FAILED ? OUT_OF_MEMORY : OK;
}
status cuMemAddressFree(uint64_t at, size_t n) { return munmap((void *)at, n) ? INVALID : OK; }
status cuMemCreate(uint64_t *h, size_t n, const void *p, uint64_t flags) {
    (void)p; (void)flags;
    if (n == 0 || n % GRANULARITY) return INVALID;
    if (used + n > total()) return OUT_OF_MEMORY;
    used += n;
    *h = n;
    return OK;
}
status cuMemRelease(uint64_t h) { used -= h; return OK; }
status cuMemMap(uint64_t at, size_t n, size_t offset, uint64_t h, uint64_t flags) { (void)at; (void)flags; return offset || n != h; }
status cuMemSetAccess(uint64_t at, size_t n, const void *d, size_t c) {
    (void)d; (void)c;
    if (mprotect((void *)at, n, PROT_READ | PROT_WRITE)) return INVALID;
    // what a device's memory holds at first
    memset((void *)at, 0xff, n);
    return OK;
}
status cuMemUnmap(uint64_t at, size_t n) { return mprotect((void *)at, n, PROT_NONE) ? INVALID : OK; }
status cuMemHostAlloc(void **p, size_t n, unsigned flags) { (void)flags; *p = malloc(n); return *p ? OK : OUT_OF_MEMORY; }
status cuMemFreeHost(void *p) { free(p); return OK; }

status cuStreamCreate(stream **s, unsigned flags) { (void)flags; *s = calloc(1, sizeof(stream)); return OK; }
status cuStreamDestroy_v2(stream *s) { (void)s; return OK; }
status cuStreamSynchronize(stream *s) { return s->capturing ? INVALID : drain(s); }
status cuEventCreate(event **e, unsigned flags) { (void)flags; *e = calloc(1, sizeof(event)); return OK; }
status cuEventDestroy_v2(event *e) { (void)e; return OK; }
status cuEventRecord(event *e, stream *s) { *e = (event){ .in = s }; return push(s, (op){ .kind = RECORD, .to = e }); }
status cuEventSynchronize(event *e) {
    if (e->in && e->at == 0) drain(e->in);
    return broken;
}
status cuEventElapsedTime_v2(float *ms, event *a, event *b) { *ms = (float)(b->at - a->at); return a->at > 0 && b->at > 0 ? OK : INVALID; }

status cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, stream *s) { return push(s, (op){ .kind = COPY, .to = (void *)to, .from = from, .bytes = n }); }
status cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, stream *s) { return push(s, (op){ .kind = COPY, .to = to, .from = (void *)from, .bytes = n }); }
status cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, stream *s) { return push(s, (op){ .kind = COPY, .to = (void *)to, .from = (void *)from, .bytes = n }); }
status cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, stream *s) { return push(s, (op){ .kind = CLEAR, .to = (void *)to, .value = v, .bytes = n }); }

status cuModuleLoadDataEx(module **m, const char *text, unsigned n, const int *options, void **values) {
    char path[4096];
    module loaded = { 0 };
    if (!current) return INVALID;
    int real = strstr(text, ".version") != NULL;
    if (!real && sscanf(text, "%d %4095s", &loaded.params, path) == 2) loaded.library = dlopen(path, RTLD_NOW);
    if (!real && !loaded.library) {
        for (unsigned i = 0; i < n; i++)
            if (options[i] == 5) snprintf(values[i], 64, "ptxas: line 1: no such instruction");
        return INVALID_PTX;
    }
    *m = malloc(sizeof(module));
    **m = loaded;
    return OK;
}
status cuModuleLoadData(module **m, const char *image) { return cuModuleLoadDataEx(m, image, 0, NULL, NULL); }
status cuModuleUnload(module *m) { free(m); return OK; }
status cuModuleGetFunction(function **f, module *m, const char *name) {
    function found = { .run = m->library ? (code)dlsym(m->library, name) : NULL, .params = m->params };
    if ((m->library && !found.run) || m->params + 6 > MAX_ARGS) return INVALID;
    snprintf(found.name, sizeof found.name, "%s", name);
    *f = malloc(sizeof(function));
    **f = found;
    return OK;
}
status cuFuncLoad(function *f) { return f ? OK : INVALID; }
status cuFuncSetAttribute(function *f, int a, int v) { (void)f; (void)a; (void)v; return OK; }

typedef struct { unsigned grid[3], block[3], shared; stream *stream; void *attributes; unsigned count; } config;
status cuLaunchKernelEx(const config *c, function *f, void **params, void **extra) {
    op o = { .kind = LAUNCH, .f = f, .blocks = c->grid[0], .early = c->count };
    if (f && !strcmp(f->name, "copy_rows")) {
        const struct { uint64_t from, to, bytes; } *rows = params[0];
        for (unsigned i = 0; i < c->grid[0]; i++) cuMemcpyDtoDAsync_v2(rows[i].to, rows[i].from, rows[i].bytes, c->stream);
        return broken;
    }
    if (f && !f->run) return push(c->stream, o);
    if (!f || extra || c->block[0] != 32 || !c->grid[0] || c->grid[1] != 1 || c->grid[2] != 1) return INVALID;
    for (int i = 0; i < 4 + f->params + 2; i++) o.args[i] = *(uint64_t *)params[i];
    uint64_t tasks = o.args[4 + f->params + 1];
    int tail = !strncmp(f->name, "nextc_tail", 10);
    if (c->grid[0] != (tail ? 1 : (tasks + 31) / 32)) return INVALID;
    return push(c->stream, o);
}

status cuStreamBeginCapture_v2(stream *s, int mode) { (void)mode; s->capturing = 1; return broken; }
status cuStreamEndCapture(stream *s, list **g) {
    *g = malloc(sizeof(list));
    **g = s->captured;
    s->captured = (list){ 0 };
    s->capturing = 0;
    return broken;
}
status cuGraphInstantiateWithFlags(list **e, list *g, uint64_t flags) {
    (void)flags;
    *e = calloc(1, sizeof(list));
    for (size_t i = 0; i < g->count; i++) append(*e, g->ops[i]);
    return OK;
}
status cuGraphDestroy(list *g) { free(g->ops); free(g); return OK; }
status cuGraphExecDestroy(list *e) { return cuGraphDestroy(e); }
status cuGraphLaunch(list *e, stream *s) {
    if (s->capturing) return INVALID;
    for (size_t i = 0; i < e->count; i++) push(s, e->ops[i]);
    return broken;
}

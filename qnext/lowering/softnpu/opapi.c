/* Handles of aclnn (tensors, scalars, lists) and the two phases of its calls.
 *
 * Every aclnnXGetWorkspaceSize is a trampoline (made by build.py) that jumps through a table. The
 * first call of a process imports the kernels, so a program needs nothing but the library path.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define API __attribute__((visibility("default")))
#ifndef KERNELS
#define KERNELS "qnext.lowering.softnpu.kernels"
#endif
enum { NO_KERNEL = 561103, NO_EXECUTOR = 561000, DIMS = 12 };
/* bridge.py reads these; the kind tells a handle from another, so a wrong signature is seen */
enum { TENSOR = 0x5A01, LIST, SCALAR };
typedef struct { int64_t kind, rank, shape[DIMS], strides[DIMS], offset; int32_t dtype, format; void *data; } Tensor;
typedef struct { int64_t kind, count; void *items; } List;
typedef struct { int64_t kind; int32_t dtype; int64_t raw[2]; } Scalar;

API Tensor *aclCreateTensor(const int64_t *shape, uint64_t rank, int dtype, const int64_t *strides, int64_t offset, int format, const int64_t *storage, uint64_t storage_rank, void *data) {
  (void)storage, (void)storage_rank;
  if (rank > DIMS) return NULL;
  Tensor *t = calloc(1, sizeof *t);
  t->kind = TENSOR, t->rank = rank, t->dtype = dtype, t->format = format, t->offset = offset, t->data = data;
  int64_t stride = 1;
  for (int i = (int)rank - 1; i >= 0; --i) {
    t->shape[i] = shape[i];
    t->strides[i] = strides ? strides[i] : stride;
    stride *= shape[i];
  }
  return t;
}
API int aclDestroyTensor(const Tensor *t) { free((void *)t); return 0; }
static int width(int dtype) {
  switch (dtype) {
  case 9: case 10: case 11: case 16: return 8;
  case 17: return 16;
  case 0: case 3: case 8: return 4;
  case 1: case 6: case 7: case 27: return 2;
  default: return 1;
  }
}
API Scalar *aclCreateScalar(void *value, int dtype) {
  Scalar *s = calloc(1, sizeof *s);
  s->kind = SCALAR, s->dtype = dtype;
  memcpy(s->raw, value, width(dtype));
  return s;
}
API int aclDestroyScalar(const Scalar *s) { free((void *)s); return 0; }
static List *list(const void *items, uint64_t count, int each) {
  List *l = malloc(sizeof *l);
  l->kind = LIST, l->count = count;
  l->items = malloc(count * each + 1);
  if (count) memcpy(l->items, items, count * each);
  return l;
}
static int drop(const List *l, int owned) {
  if (!l) return 0;
  for (int64_t i = 0; owned && i < l->count; ++i) free(((void **)l->items)[i]);
  free(l->items);
  free((void *)l);
  return 0;
}
API List *aclCreateIntArray(const int64_t *v, uint64_t n) { return list(v, n, 8); }
API List *aclCreateFloatArray(const float *v, uint64_t n) { return list(v, n, 4); }
API List *aclCreateBoolArray(const char *v, uint64_t n) { return list(v, n, 1); }
API List *aclCreateTensorList(Tensor *const *v, uint64_t n) { return list(v, n, 8); }
API List *aclCreateScalarList(Scalar *const *v, uint64_t n) { return list(v, n, 8); }
API int aclDestroyIntArray(const List *l) { return drop(l, 0); }
API int aclDestroyFloatArray(const List *l) { return drop(l, 0); }
API int aclDestroyBoolArray(const List *l) { return drop(l, 0); }
API int aclDestroyTensorList(const List *l) { return drop(l, 1); }
API int aclDestroyScalarList(const List *l) { return drop(l, 1); }
API int aclGetViewShape(const Tensor *t, int64_t **shape, uint64_t *rank) {
  *rank = t->rank;
  *shape = malloc(8 * (t->rank + 1));
  memcpy(*shape, t->shape, 8 * t->rank);
  return 0;
}
API int aclDestroyAclOpExecutor(void *e) { (void)e; return 0; }

/* An executor is a planned call: a number that bridge.py gave it. */
typedef struct { int64_t id; char *name; } Executor;
API int (*softnpu_run)(int64_t id) = NULL;
API void (*softnpu_drop)(int64_t id) = NULL;
extern int softnpu_issue(void *stream, const char *name, int (*run)(void *), void (*drop)(void *), void *argument);
static int run(void *e) { return softnpu_run ? softnpu_run(((Executor *)e)->id) : NO_KERNEL; }
static void forget(void *e) {
  if (softnpu_drop) softnpu_drop(((Executor *)e)->id);
  free(((Executor *)e)->name);
  free(e);
}
API void *softnpu_executor(int64_t id, const char *name) {
  Executor *e = malloc(sizeof *e);
  e->id = id, e->name = strdup(name);
  return e;
}
API int softnpu_execute(void *workspace, uint64_t size, void *executor, void *stream) {
  (void)workspace, (void)size;
  return executor ? softnpu_issue(stream, ((Executor *)executor)->name, run, forget, executor) : NO_EXECUTOR;
}

/* names and slots of the trampolines; a slot holds softnpu_first, softnpu_missing or a kernel */
extern const char *const softnpu_names[];
extern void *softnpu_table[];
extern const int64_t softnpu_count;
extern void softnpu_first(void), softnpu_missing(void);
int softnpu_complain(const char *name) {
  fprintf(stderr, "softnpu: %s has no kernel: write one under qnext/lowering/softnpu/kernels\n", name);
  return NO_KERNEL;
}
/* The first aclnn call of a process: import the kernels, then mark what none of them filled. */
void softnpu_load(void) {
  int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
  void (*release)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
  int (*simple)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
  if (ensure && release && simple) {
    int state = ensure();
    if (simple("import " KERNELS)) fprintf(stderr, "softnpu: " KERNELS " does not import\n");
    release(state);
  }
  for (int64_t i = 0; i < softnpu_count; ++i)
    if (softnpu_table[i] == (void *)softnpu_first) softnpu_table[i] = (void *)softnpu_missing;
}

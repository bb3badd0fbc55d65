/* HCCL, as far as ProcessGroupHCCL and the fused calls use it: each call goes to a function written
 * in Python, see hccl.py, which makes it a task of its stream. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#define API __attribute__((visibility("default")))
enum { INTERNAL = 4 };
enum { ROOT, JOIN, LEAVE, NAME, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, ALL_TO_ALL, SCATTER, SLOTS };
API void *softnpu_hccl[SLOTS];

static void *slot(int at) {
  if (!softnpu_hccl[at]) {
    void (*load)(void) = (void (*)(void))dlsym(dlopen("libopapi.so", RTLD_NOW | RTLD_GLOBAL), "softnpu_load");
    if (load) load();
  }
  return softnpu_hccl[at];
}
static int no_function(void) {
  fprintf(stderr, "softnpu: hccl.py does not import\n");
  return INTERNAL;
}
#define FORWARD(name, at, parameters, ...) \
  API int name parameters { \
    int (*to) parameters = (int(*) parameters)slot(at); \
    return to ? to(__VA_ARGS__) : no_function(); \
  }
typedef const void *In;
typedef void *Out;
FORWARD(HcclGetRootInfo, ROOT, (Out info), info)
FORWARD(softnpu_join, JOIN, (uint32_t ranks, In info, uint32_t rank, Out *made), ranks, info, rank, made)
API int HcclCommInitRootInfo(uint32_t ranks, In info, uint32_t rank, Out *made) { return softnpu_join(ranks, info, rank, made); }
API int HcclCommInitRootInfoConfig(uint32_t ranks, In info, uint32_t rank, In config, Out *made) {
  (void)config;
  return softnpu_join(ranks, info, rank, made);
}
FORWARD(HcclCommDestroy, LEAVE, (Out group), group)
FORWARD(HcclGetCommName, NAME, (Out group, char *name), group, name)
FORWARD(HcclAllReduce, ALL_REDUCE, (In from, Out into, uint64_t count, int kind, int how, Out group, Out stream), from, into, count, kind, how, group, stream)
FORWARD(HcclAllGather, ALL_GATHER, (In from, Out into, uint64_t count, int kind, Out group, Out stream), from, into, count, kind, group, stream)
FORWARD(HcclReduceScatter, REDUCE_SCATTER, (In from, Out into, uint64_t count, int kind, int how, Out group, Out stream), from, into, count, kind, how, group, stream)
FORWARD(HcclBroadcast, BROADCAST, (Out data, uint64_t count, int kind, uint32_t root, Out group, Out stream), data, count, kind, root, group, stream)
FORWARD(HcclScatter, SCATTER, (In from, Out into, uint64_t count, int kind, uint32_t root, Out group, Out stream), from, into, count, kind, root, group, stream)
FORWARD(HcclAlltoAll, ALL_TO_ALL, (In from, uint64_t sent, int kind, Out into, uint64_t came, int as, Out group, Out stream), from, sent, kind, into, came, as, group, stream)
API int HcclGetCommAsyncError(Out group, int *error) { (void)group; *error = 0; return 0; }
API const char *HcclGetErrorString(int code) { (void)code; return "see the lines of softnpu above"; }
API int HcclGetCommConfigCapability(void) { return 0; }
API int HcclSetConfig(int what, uint64_t value) { (void)what, (void)value; return 0; }
API int HcclCommWorkingDevNicSet(void) { return 0; }
API int HcclCommResume(Out group) { (void)group; return 0; }

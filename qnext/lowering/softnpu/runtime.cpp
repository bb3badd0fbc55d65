// The acl runtime over host memory, as far as torch_npu uses it. A task runs when it is issued; on a
// capturing stream it is recorded instead. Whatever a chip would silently do wrong fails here.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>
#define API extern "C" __attribute__((visibility("default")))
using Status = int;
using Task = std::function<Status()>;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {
enum : Status {
  OK = 0,
  INVALID = 107000,       // ACL_ERROR_RT_PARAM_INVALID
  CAPTURE_STATE = 107026, // a capture call out of order
  CAPTURE_SYNC = 107027,  // a synchronisation while a stream captures
  UPDATE = 107003,        // an update that does not match what was captured
  NO_MEMORY = 207001,
  STUCK = 507046,         // ACL_ERROR_RT_STREAM_SYNC_TIMEOUT: a chip would hang
};
struct Model;
struct Group { Model *model; std::vector<size_t> nodes; };
struct Node { std::string name; Task run; Group *group; };
struct Stream {
  uint32_t id = 0;
  Model *capture = nullptr;
  bool origin = false;
  Group *group = nullptr, *update = nullptr;
  size_t updated = 0;
  uint64_t issued = 0, joined = 0; // tasks of a captured fork; how many an event has carried back
};
struct Model {
  uint32_t id;
  int mode = 0;
  bool active = true;
  std::vector<Node> nodes;
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<Stream *> forks;
};
struct Event { double time = 0; uint32_t flag = 0; Model *capture = nullptr; Stream *from = nullptr; uint64_t at = 0; };

std::recursive_mutex lock;
Stream default_stream;
std::map<char *, size_t> memory;
size_t allocated = 0;
uint32_t streams = 1, models = 1;
int capturing = 0, capture_mode = 0; // 0 global, 1 thread local, 2 relaxed
thread_local int current_device = 0;

Status complain(Status code, const char *what) {
  fprintf(stderr, "softnpu: %s (%d)\n", what, code);
  return code;
}
// "name value" lines of the file `options` beside this library
const std::string &option(const char *name, const char *otherwise) {
  static std::map<std::string, std::string> read = [] {
    std::map<std::string, std::string> got;
    Dl_info info;
    dladdr((void *)&complain, &info);
    std::string path(info.dli_fname), key, value;
    std::ifstream file(path.substr(0, path.rfind('/') + 1) + "options");
    while (file >> key >> value) got[key] = value;
    return got;
  }();
  return read.emplace(name, otherwise).first->second;
}
Stream *stream_of(void *s) { return s ? (Stream *)s : &default_stream; }
double milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
} // namespace

// launches, H2H, H2D, D2H, D2D copies, synchronisations, bytes allocated: see bridge.counters
API uint64_t softnpu_counters[7] = {0};
enum { LAUNCHES, COPIES, SYNCS = 5, BYTES = 6 };

static Status issue(void *s, const char *name, Task task) {
  {
    Lock held(lock);
    Stream *st = stream_of(s);
    if (Group *group = st->update) { // a task group's update: the next task of the group is replaced
      if (st->updated >= group->nodes.size()) return complain(UPDATE, "an update adds a task to a captured group");
      Node &node = group->model->nodes[group->nodes[st->updated++]];
      if (node.name != name) return complain(UPDATE, ("an update puts " + std::string(name) + " for " + node.name).c_str());
      node.run = std::move(task);
      return OK;
    }
    if (st->capture) {
      st->capture->nodes.push_back({name, std::move(task), st->group});
      if (st->group) st->group->nodes.push_back(st->capture->nodes.size() - 1);
      ++st->issued;
      return OK;
    }
    ++softnpu_counters[LAUNCHES];
  }
  return task(); // without the lock: a kernel written in Python waits for the interpreter's
}
// `run(argument)` is the task; `drop(argument)` when it is never to run again
API Status softnpu_issue(void *s, const char *name, Status (*run)(void *), void (*drop)(void *), void *argument) {
  std::shared_ptr<void> owned(argument, drop);
  return issue(s, name, [run, owned] { return run(owned.get()); });
}
API const char *softnpu_option(const char *name) { return option(name, "").c_str(); }

// ---- devices
API Status aclInit(const char *) { return OK; }
API Status aclFinalize() { return OK; }
API Status aclrtGetDeviceCount(uint32_t *n) { *n = 1; return OK; }
API Status aclrtSetDevice(int32_t d) { current_device = d; return d ? INVALID : OK; }
API Status aclrtGetDevice(int32_t *d) { *d = current_device; return OK; }
API Status aclrtResetDevice(int32_t) { return OK; }
API const char *aclrtGetSocName() { return option("soc", "Ascend910B3").c_str(); }
API const char *aclGetRecentErrMsg() { return "see the lines of softnpu above"; }
API Status aclrtGetCurrentContext(void **c) { static int context; *c = &context; return OK; }
API Status aclrtSetCurrentContext(void *) { return OK; }
API Status aclrtGetPrimaryCtxState(int32_t, uint32_t *f, int32_t *a) { if (f) *f = 0; if (a) *a = 1; return OK; }
API Status aclrtDeviceCanAccessPeer(int32_t *c, int32_t, int32_t) { *c = 0; return OK; }
API Status aclrtGetDeviceInfo(uint32_t, int, int64_t *v) { *v = 0; return OK; }
API Status aclGetDeviceCapability(uint32_t, int, int64_t *v) { *v = 1; return OK; }
API Status aclGetCannAttributeList(const int **l, size_t *n) { static int none[1]; *l = none; *n = 0; return OK; }
API Status aclGetCannAttribute(int, int32_t *v) { *v = 1; return OK; }
API Status aclrtSetOpExecuteTimeOutV2(uint64_t, uint64_t *a) { if (a) *a = 0; return OK; }
API Status aclrtGetDeviceResLimit(int32_t, int, uint32_t *v) { *v = 24; return OK; }
API Status aclrtGetStreamResLimit(void *, int, uint32_t *v) { *v = 24; return OK; }
API Status aclrtGetResInCurrentThread(int, uint32_t *v) { *v = 24; return OK; }
API Status aclsysGetCANNVersion(int, char *v) { memset(v, 0, 128); strncpy(v, option("cann", "8.5.0").c_str(), 127); return OK; }
API Status aclsysGetVersionStr(char *, char *v) { strcpy(v, option("cann", "8.5.0").c_str()); return OK; }
// calls that the wheel looks up by name and that mean nothing here
#define NOTHING(name) API Status name() { return OK; }
NOTHING(aclrtGetDeviceUtilizationRate) NOTHING(aclrtSetDeviceSatMode) NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclrtSetOpWaitTimeout) NOTHING(aclrtSetDeviceResLimit) NOTHING(aclrtResetDeviceResLimit)
NOTHING(aclrtSetStreamResLimit) NOTHING(aclrtResetStreamResLimit) NOTHING(aclrtUseStreamResInCurrentThread)
NOTHING(aclrtUnuseStreamResInCurrentThread) NOTHING(aclrtGetLastError) NOTHING(aclrtPeekAtLastError)
NOTHING(aclrtHostRegisterV2) NOTHING(aclrtHostUnregister) NOTHING(aclrtSetStreamFailureMode)
NOTHING(aclrtSetStreamAttribute) NOTHING(aclrtSetStreamOverflowSwitch) NOTHING(aclrtSubscribeReport)
NOTHING(aclrtUnSubscribeReport)

// ---- memory: fresh is 0xA5, freed is 0xDB, never zero
API Status aclrtMalloc(void **p, size_t n, int) {
  Lock held(lock);
  n = (n + 511) / 512 * 512 + (n ? 0 : 512);
  if (posix_memalign(p, 512, n)) return NO_MEMORY;
  memset(*p, 0xA5, n);
  memory[(char *)*p] = n;
  softnpu_counters[BYTES] = allocated += n;
  return OK;
}
API Status aclrtMallocAlign32(void **p, size_t n, int k) { return aclrtMalloc(p, n, k); }
API Status aclrtFree(void *p) {
  Lock held(lock);
  auto found = memory.find((char *)p);
  if (found == memory.end()) return p ? complain(INVALID, "a free of what was never allocated") : OK;
  memset(p, 0xDB, found->second);
  softnpu_counters[BYTES] = allocated -= found->second;
  memory.erase(found);
  free(p);
  return OK;
}
API Status aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 64, n ? n : 64) ? NO_MEMORY : OK; }
API Status aclrtMallocHostWithCfg(void **p, uint64_t n, void *) { return aclrtMallocHost(p, n); }
API Status aclrtFreeHost(void *p) { free(p); return OK; }
API Status aclrtHostRegister(void *p, uint64_t, int, void **d) { *d = p; return OK; }
static bool on_device(const void *p, size_t n) {
  auto after = memory.upper_bound((char *)p);
  if (after == memory.begin()) return false;
  --after;
  return (char *)p + n <= after->first + after->second;
}
struct Attributes { struct { uint32_t id; int type; } location; uint32_t page, reserved[4]; };
API Status aclrtPointerGetAttributes(const void *p, Attributes *a) {
  Lock held(lock);
  memset(a, 0, sizeof *a);
  a->location.type = on_device(p, 1);
  return OK;
}
API Status aclrtGetMemInfo(int, size_t *f, size_t *t) { *t = 64ull << 30; *f = *t - allocated; return OK; }
static Status copy(void *d, size_t room, const void *s, size_t n, int kind) {
  if (n > room) return complain(INVALID, "a copy beyond its destination");
  {
    Lock held(lock);
    if ((kind == 1 || kind == 3) && !on_device(d, n)) return complain(INVALID, "a copy to memory that is not the device's");
    if ((kind == 2 || kind == 3) && !on_device(s, n)) return complain(INVALID, "a copy from memory that is not the device's");
    ++softnpu_counters[COPIES + (kind & 3)];
  }
  memmove(d, s, n);
  return OK;
}
API Status aclrtMemcpy(void *d, size_t room, const void *s, size_t n, int kind) {
  ++softnpu_counters[SYNCS];
  return copy(d, room, s, n, kind);
}
API Status aclrtMemcpyAsync(void *d, size_t room, const void *s, size_t n, int kind, void *st) {
  static const char *names[] = {"memcpy_h2h", "memcpy_h2d", "memcpy_d2h", "memcpy_d2d"};
  return issue(st, names[kind & 3], [=] { return copy(d, room, s, n, kind); });
}
API Status aclrtMemcpyAsyncWithCondition(void *d, size_t room, const void *s, size_t n, int kind, void *st) { return aclrtMemcpyAsync(d, room, s, n, kind, st); }
API Status aclrtMemset(void *d, size_t, int32_t v, size_t n) { memset(d, v, n); return OK; }
API Status aclrtMemsetAsync(void *d, size_t, int32_t v, size_t n, void *st) { return issue(st, "memset", [=] { memset(d, v, n); return OK; }); }
API Status aclrtCmoAsync(void *, size_t, int, void *st) { return issue(st, "prefetch", [] { return OK; }); }

// ---- streams; never freed, as an event may still point at one
API Status aclrtCreateStream(void **s) { Lock held(lock); auto *made = new Stream; made->id = streams++; *s = made; return OK; }
API Status aclrtCreateStreamWithConfig(void **s, uint32_t, uint32_t) { return aclrtCreateStream(s); }
API Status aclrtDestroyStream(void *) { return OK; }
API Status aclrtDestroyStreamForce(void *) { return OK; }
API Status aclrtGetStreamOverflowSwitch(void *, uint32_t *v) { *v = 0; return OK; }
API Status aclrtStreamGetId(void *s, int32_t *i) { *i = stream_of(s)->id; return OK; }
API Status aclrtStreamQuery(void *, int *done) { *done = 0; return OK; }
static Status synchronize(bool refused) {
  if (refused) return complain(CAPTURE_SYNC, "a synchronisation while a stream captures");
  ++softnpu_counters[SYNCS];
  return OK;
}
API Status aclrtSynchronizeStream(void *s) { return synchronize(stream_of(s)->capture); }
API Status aclrtSynchronizeStreamWithTimeout(void *s, int32_t) { return synchronize(stream_of(s)->capture); }
API Status aclrtSynchronizeDevice() { return synchronize(capturing && !capture_mode); }
API Status aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronize(capturing && !capture_mode); }
API Status aclrtLaunchHostFunc(void *s, void (*f)(void *), void *a) { return issue(s, "host_function", [=] { f(a); return OK; }); }
API Status aclrtLaunchCallback(void (*f)(void *), void *a, int, void *s) { return aclrtLaunchHostFunc(s, f, a); }

// ---- events: a record on a capturing stream forks, a wait for it elsewhere joins the capture
API Status aclrtCreateEventWithFlag(void **e, uint32_t flag) { auto *made = new Event; made->flag = flag; *e = made; return OK; }
API Status aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return aclrtCreateEventWithFlag(e, flag); }
API Status aclrtDestroyEvent(void *e) { delete (Event *)e; return OK; }
API Status aclrtRecordEvent(void *e, void *s) {
  Lock held(lock);
  auto *event = (Event *)e;
  auto *st = stream_of(s);
  event->time = milliseconds();
  event->capture = event->flag == 0x20u ? nullptr : st->capture; // 0x20: an external event
  event->from = st;
  event->at = st->issued;
  return OK;
}
API Status aclrtStreamWaitEvent(void *s, void *e) {
  Lock held(lock);
  auto *event = (Event *)e;
  auto *st = stream_of(s);
  if (!event->capture || !event->capture->active) return OK;
  if (!st->capture) {
    st->capture = event->capture;
    st->issued = st->joined = 0;
    event->capture->forks.push_back(st);
  }
  if (event->from != st && event->from->joined < event->at) event->from->joined = event->at;
  return OK;
}
API Status aclrtResetEvent(void *, void *) { return OK; }
API Status aclrtQueryEventStatus(void *, int *done) { *done = 1; return OK; }
API Status aclrtQueryEventWaitStatus(void *, int *done) { *done = 0; return OK; }
API Status aclrtSynchronizeEvent(void *e) { auto *m = ((Event *)e)->capture; return synchronize(m && m->active); }
API Status aclrtEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(((Event *)b)->time - ((Event *)a)->time); return OK; }
API Status aclrtEventGetTimestamp(void *e, uint64_t *t) { *t = (uint64_t)(((Event *)e)->time * 1000); return OK; }
// an external event is a word of device memory
API Status aclrtValueWrite(void *p, uint64_t v, uint32_t, void *s) { return issue(s, "value_write", [=] { *(volatile uint64_t *)p = v; return OK; }); }
API Status aclrtValueWait(void *p, uint64_t v, uint32_t, void *s) {
  return issue(s, "value_wait", [=] { return *(volatile uint64_t *)p == v ? OK : complain(STUCK, "a wait for an event that nobody recorded: a chip would hang"); });
}

// ---- capture
API Status aclmdlRICaptureBegin(void *s, int mode) {
  Lock held(lock);
  auto *st = stream_of(s);
  if (st->capture) return complain(CAPTURE_STATE, "a capture on a stream that captures already");
  st->capture = new Model{models++, mode};
  st->origin = true;
  capture_mode = mode;
  ++capturing;
  return OK;
}
API Status aclmdlRICaptureGetInfo(void *s, int *status, void **m) { auto *st = stream_of(s); *status = st->capture ? 1 : 0; if (m) *m = st->capture; return OK; }
API Status aclmdlRIGetId(void *m, uint32_t *id) { *id = ((Model *)m)->id; return OK; }
API Status aclmdlRICaptureEnd(void *s, void **m) {
  Lock held(lock);
  auto *st = stream_of(s);
  if (!st->capture || !st->origin) return complain(CAPTURE_STATE, "the end of a capture that this stream did not begin");
  auto *model = st->capture;
  bool open = false;
  for (auto *fork : model->forks) {
    open = open || fork->joined < fork->issued;
    fork->capture = nullptr;
  }
  *m = model;
  model->active = st->origin = false;
  st->capture = nullptr;
  capture_mode = 0;
  --capturing;
  return open ? complain(CAPTURE_STATE, "the end of a capture with a forked stream not joined") : OK;
}
API Status aclmdlRICaptureThreadExchangeMode(int *mode) { std::swap(*mode, capture_mode); return OK; }
API Status aclmdlRIExecuteAsync(void *m, void *s) {
  auto *model = (Model *)m;
  if (model->active || stream_of(s)->capture) return complain(CAPTURE_STATE, "a replay while capturing");
  for (auto &node : model->nodes) {
    ++softnpu_counters[LAUNCHES];
    if (Status wrong = node.run()) return wrong;
  }
  return OK;
}
API Status aclmdlRIDestroy(void *m) { delete (Model *)m; return OK; }
API Status aclmdlRICaptureTaskGrpBegin(void *s) {
  Lock held(lock);
  auto *st = stream_of(s);
  if (!st->capture || st->group) return complain(CAPTURE_STATE, "a task group outside a capture, or in another");
  st->capture->groups.emplace_back(st->group = new Group{st->capture, {}});
  return OK;
}
API Status aclmdlRICaptureTaskGrpEnd(void *s, void **h) { auto *st = stream_of(s); if (!st->group) return CAPTURE_STATE; *h = st->group; st->group = nullptr; return OK; }
API Status aclmdlRICaptureTaskUpdateBegin(void *s, void *h) { auto *st = stream_of(s); if (st->update) return CAPTURE_STATE; st->update = (Group *)h; st->updated = 0; return OK; }
API Status aclmdlRICaptureTaskUpdateEnd(void *s) {
  auto *st = stream_of(s);
  if (!st->update) return CAPTURE_STATE;
  bool all = st->updated == st->update->nodes.size();
  st->update = nullptr;
  return all ? OK : complain(UPDATE, "an update leaves tasks of its group as they were");
}
API Status aclmdlRIDebugPrint(void *m) { for (auto &n : ((Model *)m)->nodes) fprintf(stderr, "  %s%s\n", n.name.c_str(), n.group ? " (updatable)" : ""); return OK; }
API Status aclmdlRIDebugJsonPrint(void *m, const char *path, uint32_t) {
  FILE *f = fopen(path, "w");
  if (!f) return INVALID;
  const char *separator = "[";
  int at = 0;
  for (auto &n : ((Model *)m)->nodes) {
    fprintf(f, "%s\n{\"name\": \"%s\", \"ph\": \"X\", \"pid\": 0, \"tid\": 0, \"ts\": %d, \"dur\": 1, \"args\": {\"updatable\": %s}}", separator, n.name.c_str(), at++, n.group ? "true" : "false");
    separator = ",";
  }
  fputs(at ? "\n]\n" : "[]\n", f);
  fclose(f);
  return OK;
}

/* The part of Ascend's runtime library that torch_npu needs before it runs any op: one device type whose memory is the
   host's and whose streams are always finished. The other symbols torch_npu links against are generated as weak
   functions returning 0 (tests/fake_ascend.py); what the library looks up by name may be missing.

   An op must never pretend to have run: the compiled path fails here, the other one (aclnn) finds no library. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, NO_CONTEXT = 107002, NO_MEMORY = 207001, NOT_SUPPORTED = 207000, DEVICES = 16 };

int aclopCompileAndExecute() { return NOT_SUPPORTED; }
int aclopCompileAndExecuteV2() { return NOT_SUPPORTED; }
int rtKernelLaunch() { return NOT_SUPPORTED; }
const char *aclGetRecentErrMsg() { return "this is the stand-in runtime of the tests: it has no such op"; }

/* options: ops are compiled ahead, as is the default on this device type */
size_t aclGetCompileoptSize(int option) { return sizeof "disable"; }
int aclGetCompileopt(int option, char *value, size_t room) { strncpy(value, "disable", room); return OK; }
int aclSetCompileopt() { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtSetSysParamOpt() { return OK; }
int aclrtCtxSetSysParamOpt() { return OK; }
int aclrtSetOpExecuteTimeOut() { return OK; }
int aclrtSetDeviceSatMode() { return OK; }

/* devices and contexts */
static char contexts[DEVICES];
static __thread char *context;
const char *aclrtGetSocName() { return "Ascend910B3"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return OK; }
int aclrtGetDevice(int32_t *device) { if (!context) return NO_CONTEXT; *device = context - contexts; return OK; }
int aclrtSetDevice(int32_t device) { context = contexts + device; return OK; }
int aclrtGetCurrentContext(void **out) { if (!context) return NO_CONTEXT; *out = context; return OK; }
int aclrtSetCurrentContext(void *in) { context = in; return OK; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 0; return OK; }

/* memory */
static int allocate(void **out, size_t bytes) { return posix_memalign(out, 512, bytes ? bytes : 512) ? NO_MEMORY : OK; }
int aclrtMalloc(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return allocate(out, bytes); }
int aclrtMallocHost(void **out, size_t bytes) { return allocate(out, bytes); }
int aclrtFree(void *p) { free(p); return OK; }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes) { memcpy(to, from, bytes); return OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes) { memcpy(to, from, bytes); return OK; }
int aclrtMemset(void *p, size_t room, int32_t value, size_t bytes) { memset(p, value, bytes); return OK; }
int aclrtMemsetAsync(void *p, size_t room, int32_t value, size_t bytes) { memset(p, value, bytes); return OK; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) { *unused = 60ul << 30; *total = 64ul << 30; return OK; }

/* streams are in order and finished; an event is the time it was recorded at */
int aclrtCreateStream(void **stream) { return allocate(stream, 1); }
int aclrtCreateStreamWithConfig(void **stream) { return allocate(stream, 1); }
int aclrtDestroyStream(void *stream) { free(stream); return OK; }
int aclrtDestroyStreamForce(void *stream) { free(stream); return OK; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return OK; }
int aclrtSynchronizeStreamWithTimeout() { return OK; }
int aclrtSynchronizeDeviceWithTimeout() { return OK; }
int aclrtCreateEventExWithFlag(void **event) { *event = calloc(1, sizeof(struct timespec)); return OK; }
int aclrtCreateEventWithFlag(void **event) { return aclrtCreateEventExWithFlag(event); }
int aclrtDestroyEvent(void *event) { free(event); return OK; }
int aclrtRecordEvent(void *event) { clock_gettime(CLOCK_MONOTONIC, event); return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *ms, struct timespec *from, struct timespec *to) {
    *ms = (to->tv_sec - from->tv_sec) * 1e3 + (to->tv_nsec - from->tv_nsec) / 1e6;
    return OK;
}

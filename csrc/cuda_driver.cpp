#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

namespace asyncckpt::cuda {
namespace {

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  return function != nullptr;
}

// The name of the first entry point that is missing; nullptr when all are there.
const char* resolve(void* library, Driver& d) {
#define ASYNCCKPT_FIND(member, name) \
  if (!find(library, name, d.member)) return name
  ASYNCCKPT_FIND(init, "cuInit");
  ASYNCCKPT_FIND(device_get, "cuDeviceGet");
  ASYNCCKPT_FIND(device_get_count, "cuDeviceGetCount");
  ASYNCCKPT_FIND(primary_context_retain, "cuDevicePrimaryCtxRetain");
  ASYNCCKPT_FIND(context_push, "cuCtxPushCurrent_v2");
  ASYNCCKPT_FIND(context_pop, "cuCtxPopCurrent_v2");
  ASYNCCKPT_FIND(stream_create, "cuStreamCreateWithPriority");
  ASYNCCKPT_FIND(stream_wait_event, "cuStreamWaitEvent");
  ASYNCCKPT_FIND(event_create, "cuEventCreate");
  ASYNCCKPT_FIND(event_record, "cuEventRecord");
  ASYNCCKPT_FIND(event_synchronize, "cuEventSynchronize");
  ASYNCCKPT_FIND(copy_to_host, "cuMemcpyDtoHAsync_v2");
  ASYNCCKPT_FIND(copy_to_device, "cuMemcpyHtoDAsync_v2");
  ASYNCCKPT_FIND(host_register, "cuMemHostRegister_v2");
  ASYNCCKPT_FIND(host_unregister, "cuMemHostUnregister");
  ASYNCCKPT_FIND(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  ASYNCCKPT_FIND(error_name, "cuGetErrorName");
  ASYNCCKPT_FIND(error_string, "cuGetErrorString");
#undef ASYNCCKPT_FIND
  d.copy_batch_12 = nullptr;
  if (!find(library, "cuMemcpyBatchAsync_v2", d.copy_batch))
    find(library, "cuMemcpyBatchAsync", d.copy_batch_12);
  return nullptr;
}

}  // namespace

std::string Driver::describe(Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (error_name(result, &name) != kSuccess || name == nullptr)
    return "CUDA error " + std::to_string(result);
  if (error_string(result, &text) != kSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

const Driver* Driver::load(const std::string& library, std::string* problem) {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::string, std::unique_ptr<Driver>>();  // never destroyed
  std::lock_guard<std::mutex> lock(mutex);
  const auto known = loaded.find(library);
  if (known != loaded.end()) return known->second.get();
  void* const handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *problem = ::dlerror();
    return nullptr;
  }
  auto driver = std::make_unique<Driver>();
  if (const char* missing = resolve(handle, *driver)) {
    *problem = library + " is too old: it has no " + missing;
    return nullptr;
  }
  if (const Result result = driver->init(0); result != kSuccess) {
    *problem = "cuInit: " + driver->describe(result);
    return nullptr;
  }
  return (loaded[library] = std::move(driver)).get();
}

}  // namespace asyncckpt::cuda

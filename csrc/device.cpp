#include "device.h"

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "faults.h"

namespace asyncckpt {

using cuda::kSuccess;
using cuda::Result;

constexpr Result kNotSupported = 801;

// Makes the device's context current on this thread, in a capture mode that disturbs no graph which
// another thread captures; puts both back.
class Device::Current {
 public:
  explicit Current(const Device& device) : driver_(device.driver_) {
    result_ = driver_.context_push(device.context_);
    if (result_ == kSuccess) driver_.exchange_capture_mode(&capture_mode_);
  }
  ~Current() {
    if (result_ != kSuccess) return;
    driver_.exchange_capture_mode(&capture_mode_);
    cuda::Context popped;
    driver_.context_pop(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Result result() const { return result_; }

 private:
  const cuda::Driver& driver_;
  Result result_;
  int capture_mode_ = cuda::kCaptureModeRelaxed;
};

Device* Device::get(const std::string& library, int ordinal, DeviceFailure* failure) {
  static std::mutex mutex;
  static auto& devices =
      *new std::map<std::pair<std::string, int>, std::unique_ptr<Device>>();  // never destroyed
  std::lock_guard<std::mutex> lock(mutex);
  auto& known = devices[{library, ordinal}];
  if (known) return known.get();
  std::string problem;
  const cuda::Driver* const driver = cuda::Driver::load(library, &problem);
  if (driver == nullptr) {
    *failure = {"loading the CUDA driver", problem};
    return nullptr;
  }
  std::unique_ptr<Device> device(new Device(*driver, ordinal));
  *failure = device->open();
  if (*failure) return nullptr;
  return (known = std::move(device)).get();
}

DeviceFailure Device::open() {
  cuda::Ordinal device = 0;
  if (const Result result = driver_.device_get(&device, ordinal_); result != kSuccess)
    return failed("cuDeviceGet", result);
  if (const Result result = driver_.primary_context_retain(&context_, device); result != kSuccess)
    return failed("cuDevicePrimaryCtxRetain", result);
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  for (cuda::Stream* stream : {&to_host_, &to_device_})
    if (const Result result = driver_.stream_create(stream, cuda::kStreamNonBlocking, 0);
        result != kSuccess)
      return failed("cuStreamCreate", result);
  return {};
}

DeviceFailure Device::failed(const char* operation, Result result) const {
  return {operation, "device " + std::to_string(ordinal_) + ": " + driver_.describe(result)};
}

DeviceFailure Device::copy(Way way, const std::vector<DeviceCopy>& copies) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  Result refused = kSuccess;
  if (copies.size() > 1 && batches_) {
    refused = copy_as_batch(way, copies);
    if (refused == kSuccess) return {};
    // One by one, then, which also tells what is wrong if it is not the batch.
  }
  for (const DeviceCopy& one : copies) {
    if (way == Way::to_host) {
      const Result result = driver_.copy_to_host(one.host, one.address, one.nbytes, to_host_);
      if (result != kSuccess) return failed("cuMemcpyDtoHAsync", result);
    } else {
      const Result result = driver_.copy_to_device(one.address, one.host, one.nbytes, to_device_);
      if (result != kSuccess) return failed("cuMemcpyHtoDAsync", result);
    }
  }
  if (refused != kSuccess && batches_.exchange(false) && has_batches()) {
    std::lock_guard<std::mutex> lock(mutex_);
    batch_failure_ = failed("cuMemcpyBatchAsync", refused);
  }
  return {};
}

DeviceFailure Device::batch_failure() {
  std::lock_guard<std::mutex> lock(mutex_);
  return batch_failure_;
}

bool Device::has_batches() const {
  return driver_.copy_batch != nullptr || driver_.copy_batch_12 != nullptr;
}

Result Device::copy_as_batch(Way way, const std::vector<DeviceCopy>& copies) {
  if (!has_batches()) return kNotSupported;
  thread_local std::vector<cuda::Address> targets, sources;
  thread_local std::vector<size_t> sizes;
  targets.clear();
  sources.clear();
  sizes.clear();
  for (const DeviceCopy& one : copies) {
    const auto host = static_cast<cuda::Address>(reinterpret_cast<uintptr_t>(one.host));
    targets.push_back(way == Way::to_host ? host : one.address);
    sources.push_back(way == Way::to_host ? one.address : host);
    sizes.push_back(one.nbytes);
  }
  cuda::CopyAttributes attributes{cuda::kSourceAccessInStreamOrder, {0, 0}, {0, 0}, 0};
  size_t first = 0;
  size_t failed_at = 0;
  if (driver_.copy_batch != nullptr)
    return driver_.copy_batch(targets.data(), sources.data(), sizes.data(), sizes.size(),
                              &attributes, &first, 1, stream(way));
  return driver_.copy_batch_12(targets.data(), sources.data(), sizes.data(), sizes.size(),
                               &attributes, &first, 1, &failed_at, stream(way));
}

DeviceFailure Device::acquire(cuda::Event* event) {
  *event = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_events_.empty()) {
      *event = free_events_.back();
      free_events_.pop_back();
      return {};
    }
  }
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  // Whoever waits sleeps until the interrupt: a spinning thread would take a core from training.
  const Result result =
      driver_.event_create(event, cuda::kEventBlockingSync | cuda::kEventDisableTiming);
  if (result == kSuccess) return {};
  *event = nullptr;
  return failed("cuEventCreate", result);
}

DeviceFailure Device::record(Way way, cuda::Event event) { return record_on(stream(way), event); }

DeviceFailure Device::record(uint64_t caller_stream, cuda::Event event) {
  return record_on(reinterpret_cast<cuda::Stream>(static_cast<uintptr_t>(caller_stream)), event);
}

DeviceFailure Device::record_on(cuda::Stream stream, cuda::Event event) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  const Result result = driver_.event_record(event, stream);
  return result == kSuccess ? DeviceFailure{} : failed("cuEventRecord", result);
}

DeviceFailure Device::order_after(Way way, cuda::Event event) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  const Result result = driver_.stream_wait_event(stream(way), event, 0);
  return result == kSuccess ? DeviceFailure{} : failed("cuStreamWaitEvent", result);
}

DeviceFailure Device::make_wait(uint64_t caller_stream, cuda::Event event) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  const Result result = driver_.stream_wait_event(
      reinterpret_cast<cuda::Stream>(static_cast<uintptr_t>(caller_stream)), event, 0);
  return result == kSuccess ? DeviceFailure{} : failed("cuStreamWaitEvent", result);
}

DeviceFailure Device::wait(cuda::Event event) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  const Result result = driver_.event_synchronize(event);
  return result == kSuccess ? DeviceFailure{} : failed("cuEventSynchronize", result);
}

void Device::give_back(cuda::Event event) {
  if (event == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex_);
  free_events_.push_back(event);
}

DeviceFailure Device::register_memory(void* memory, size_t nbytes) {
  const Current current(*this);
  if (current.result() != kSuccess) return failed("cuCtxPushCurrent", current.result());
  const Result result = driver_.host_register(memory, nbytes, cuda::kHostRegisterPortable);
  return result == kSuccess ? DeviceFailure{} : failed("cuMemHostRegister", result);
}

void Device::unregister_memory(void* memory) {
  const Current current(*this);
  if (current.result() == kSuccess) driver_.host_unregister(memory);
}

}  // namespace asyncckpt

// The CUDA driver's entry points, found when a device is first used: nothing of CUDA is needed to
// build or to install. Names carry their version (`_v2`), since the bare ones are older ABIs.
//
// Types and numbers are those of the driver API's documentation (docs.nvidia.com/cuda/cuda-driver-api).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace asyncckpt::cuda {

using Result = int;
using Ordinal = int;
using Address = unsigned long long;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Event = struct CUevent_st*;

constexpr Result kSuccess = 0;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventBlockingSync = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostRegisterPortable = 1;
constexpr int kCaptureModeRelaxed = 2;

struct MemoryLocation {
  int type;
  int id;
};

struct CopyAttributes {  // CUmemcpyAttributes
  int source_access_order;
  MemoryLocation source_hint;
  MemoryLocation target_hint;
  unsigned flags;
};
constexpr int kSourceAccessInStreamOrder = 1;

struct Driver {
  Result (*init)(unsigned flags);
  Result (*device_get)(Ordinal* device, int ordinal);
  Result (*device_get_count)(int* count);
  Result (*primary_context_retain)(Context* context, Ordinal device);
  Result (*context_push)(Context context);
  Result (*context_pop)(Context* context);
  Result (*stream_create)(Stream* stream, unsigned flags, int priority);
  Result (*stream_wait_event)(Stream stream, Event event, unsigned flags);
  Result (*event_create)(Event* event, unsigned flags);
  Result (*event_record)(Event event, Stream stream);
  Result (*event_synchronize)(Event event);
  Result (*copy_to_host)(void* target, Address source, size_t nbytes, Stream stream);
  Result (*copy_to_device)(Address target, const void* source, size_t nbytes, Stream stream);
  Result (*host_register)(void* memory, size_t nbytes, unsigned flags);
  Result (*host_unregister)(void* memory);
  Result (*exchange_capture_mode)(int* mode);
  Result (*error_name)(Result result, const char** name);
  Result (*error_string)(Result result, const char** text);

  // At most one of these two is set: CUDA 13's ABI, else 12.8's, which also names what failed.
  Result (*copy_batch)(Address* targets, Address* sources, size_t* sizes, size_t count,
                       CopyAttributes* attributes, size_t* first_of_attributes,
                       size_t attributes_count, Stream stream);
  Result (*copy_batch_12)(Address* targets, Address* sources, size_t* sizes, size_t count,
                          CopyAttributes* attributes, size_t* first_of_attributes,
                          size_t attributes_count, size_t* failed, Stream stream);

  // "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)".
  std::string describe(Result result) const;

  // Loads a library once per process and initialises the driver. nullptr, and what is wrong in
  // `problem`, when that cannot be had; never unloads.
  static const Driver* load(const std::string& library, std::string* problem);
};

}  // namespace asyncckpt::cuda

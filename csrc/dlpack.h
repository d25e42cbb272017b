// What of DLPack 1.x is needed to look at tensors of another library: the layout of a tensor, and the
// table of functions that the library hangs on its tensor type. (The standard: dmlc.github.io/dlpack.)

#pragma once

#include <cstdint>

namespace asyncckpt::dlpack {

constexpr uint32_t kMajor = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

constexpr uint8_t kComplex = 5;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  const ExchangeHeader* older;  // for another major version; may be null
};

struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Describes a tensor of the library's own type, which keeps what is pointed to. 0, or -1 and a
  // Python exception.
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace asyncckpt::dlpack

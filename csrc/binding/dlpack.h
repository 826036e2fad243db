// The part of DLPack (https://dmlc.github.io/dlpack/latest/c_api.html) that a tensor on the CPU needs. The layout is
// fixed: it is how libraries that know nothing of each other hand tensors over.
#pragma once

#include <cstdint>

namespace logitless {

enum DLDeviceType : std::int32_t { kDLCPU = 1 };
enum DLDataTypeCode : std::uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };

struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};

struct DLDataType {
  DLDataTypeCode code;
  std::uint8_t bits;
  std::uint16_t lanes;  // 1: an element is one number
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);  // called once, by whoever took the tensor
};

}  // namespace logitless

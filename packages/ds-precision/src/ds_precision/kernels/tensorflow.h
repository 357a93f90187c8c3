// An operation's inputs, outputs and attributes, through TensorFlow's C interface.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tiles.h"

namespace ds {

class Failure {
 public:
  explicit Failure(std::string message) : message(std::move(message)) {}
  std::string message;
};

void require(bool fine, const std::string& message) {
  if (!fine) throw Failure(message);
}

Type type_of(TF_DataType type) {
  if (type == TF_BFLOAT16) return Type::kBfloat16;
  return type == TF_INT8 ? Type::kInt8 : Type::kFloat;
}

class Context {
 public:
  explicit Context(TF_OpKernelContext* context) : context_(context), status_(TF_NewStatus()) {}
  ~Context() {
    for (TF_Tensor* tensor : held_) TF_DeleteTensor(tensor);
    TF_DeleteStatus(status_);
  }

  TF_Tensor* input(int i) {
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, i, &tensor, status_);
    check();
    held_.push_back(tensor);
    return tensor;
  }

  char* output(int i, TF_DataType type, const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    TF_Tensor* tensor = TF_AllocateOutput(context_, i, type, shape.data(), shape.size(),
                                          count * TF_DataTypeSize(type), status_);
    check();
    held_.push_back(tensor);
    return static_cast<char*>(TF_TensorData(tensor));
  }

  // Axis `axis` of input `i`, of which no hold is kept.
  int64_t size(int i, int axis) {
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, i, &tensor, status_);
    check();
    const int64_t size = TF_NumDims(tensor) > axis ? TF_Dim(tensor, axis) : -1;
    TF_DeleteTensor(tensor);
    return size;
  }

  // Input `from` to be changed as output `i`: in its memory if nobody else holds that, else a copy.
  char* changed(int from, int i, const std::vector<int64_t>& shape) {
    for (size_t axis = 0; axis < shape.size(); axis++) {
      require(size(from, axis) == shape[axis], "a tensor to be changed has another shape");
    }
    int taken = -1;
    TF_Tensor* after = TF_ForwardInputOrAllocateOutput(context_, &from, 1, i, shape.data(),
                                                       shape.size(), &taken, status_);
    check();
    held_.push_back(after);
    if (taken < 0) {
      std::memcpy(TF_TensorData(after), TF_TensorData(input(from)), TF_TensorByteSize(after));
    }
    return static_cast<char*>(TF_TensorData(after));
  }

  TF_DataType output_type(int i) { return TF_ExpectedOutputDataType(context_, i); }

  int inputs() { return TF_NumInputs(context_); }

  // A float32 output in the memory of input `from`, if nobody else needs that. To be asked for
  // before the input is read.
  char* output_on_input(int i, int from, const std::vector<int64_t>& shape) {
    int taken = -1;
    TF_Tensor* tensor = TF_ForwardInputOrAllocateOutput(context_, &from, 1, i, shape.data(),
                                                        shape.size(), &taken, status_);
    check();
    held_.push_back(tensor);
    return static_cast<char*>(TF_TensorData(tensor));
  }

  void fail(const std::string& message) {
    TF_SetStatus(status_, TF_INVALID_ARGUMENT, message.c_str());
    TF_OpKernelContext_Failure(context_, status_);
  }

 private:
  void check() { require(TF_GetCode(status_) == TF_OK, TF_Message(status_)); }

  TF_OpKernelContext* context_;
  TF_Status* status_;
  std::vector<TF_Tensor*> held_;
};

template <class T>
T* data(TF_Tensor* tensor) { return static_cast<T*>(TF_TensorData(tensor)); }

// All axes but the last count as rows.
int64_t last(TF_Tensor* tensor) { return TF_Dim(tensor, TF_NumDims(tensor) - 1); }

int64_t rows_of(TF_Tensor* tensor) {
  int64_t rows = 1;
  for (int axis = 0; axis + 1 < TF_NumDims(tensor); axis++) rows *= TF_Dim(tensor, axis);
  return rows;
}

std::vector<int64_t> shape_with_last(TF_Tensor* tensor, int64_t size) {
  std::vector<int64_t> shape;
  for (int axis = 0; axis + 1 < TF_NumDims(tensor); axis++) shape.push_back(TF_Dim(tensor, axis));
  shape.push_back(size);
  return shape;
}

// Weights, whose float32 is rounded where `x` is bfloat16, as a cast of them would.
View matrix(TF_Tensor* tensor, TF_Tensor* x = nullptr, TF_Tensor* scales = nullptr) {
  const int rank = TF_NumDims(tensor);
  require(rank >= 1, "a product's sides must have rank 1 or more");
  View view{data<char>(tensor), type_of(TF_TensorType(tensor)), last(tensor)};
  const bool wider = x && TF_TensorType(x) == TF_BFLOAT16 && view.type == Type::kFloat;
  if (wider) view.type = Type::kRounded;
  if (view.type != Type::kInt8) return view;
  const int64_t rows = rank < 2 ? 1 : TF_Dim(tensor, rank - 2);
  require(rows % kScaleRows == 0, "8-bit weights have " + std::to_string(rows) +
                                      " rows; they must be a multiple of 32");
  require(scales && TF_TensorElementCount(scales) * kScaleRows == TF_TensorElementCount(tensor),
          "8-bit weights need one scale for 32 rows of each column");
  view.scales = data<float>(scales);
  return view;
}

struct Attributes {
  bool transpose, keep, interleave;
  float scale, epsilon;
  int32_t chosen = 1, groups = 1, best_groups = 1;  // of a route, as are the next two
  bool two = false, normalize = false;  // `two` of blocks: scales are powers of two
  int32_t rows = 1, columns = 1;        // of a block
};

bool flag(TF_OpKernelConstruction* context, const char* name) {
  TF_Status* status = TF_NewStatus();
  unsigned char value = 0;
  TF_OpKernelConstruction_GetAttrBool(context, name, &value, status);
  TF_DeleteStatus(status);
  return value;
}

}  // namespace ds

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
  switch (type) {
    case TF_FLOAT: return Type::kFloat;
    case TF_BFLOAT16: return Type::kBfloat16;
    case TF_INT8: return Type::kInt8;
    case TF_UINT8: return Type::kInt4;
    case TF_FLOAT8_E4M3FN: return Type::kE4M3;
    default: throw Failure("a product has no such type of numbers");
  }
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
View matrix(TF_Tensor* tensor, TF_Tensor* x = nullptr) {
  require(TF_NumDims(tensor) >= 1, "a product's sides must have rank 1 or more");
  View view{data<char>(tensor), type_of(TF_TensorType(tensor)), last(tensor)};
  if (TF_NumDims(tensor) > 1) {
    view.matrix = TF_Dim(tensor, TF_NumDims(tensor) - 2) * last(tensor) * size_of(view.type);
  }
  const bool wider = x && TF_TensorType(x) == TF_BFLOAT16 && view.type == Type::kFloat;
  if (wider) view.type = Type::kRounded;
  return view;
}

// Weights that may be small, `[..., rows, columns]`, those of 4 bits with half as many rows in
// memory. Scales are `[..., groups of rows, columns]` bfloat16, or of E4M3 a float32 for each block
// of 128 by 128.
View weights(TF_Tensor* tensor, TF_Tensor* x, TF_Tensor* scales) {
  View view = matrix(tensor, x);
  if (!is_small(view.type)) return view;
  const int rank = TF_NumDims(tensor);
  require(rank >= 2 && TF_NumDims(scales) == rank, "small weights and their scales need one rank");
  const int64_t rows = TF_Dim(tensor, rank - 2) * rows_a_byte(view.type), columns = last(tensor);
  const int64_t down = TF_Dim(scales, rank - 2), across = last(scales);
  const bool blocks = view.type == Type::kE4M3;
  if (blocks) {
    const auto parts = [](int64_t size) { return (size + kScaleColumns - 1) / kScaleColumns; };
    require(TF_TensorType(scales) == TF_FLOAT && down == parts(rows) && across == parts(columns),
            "E4M3 weights need a float32 scale for each block of 128 by 128");
    view.scale_rows = kScaleColumns;
  } else {
    require(TF_TensorType(scales) == TF_BFLOAT16 && across == columns && down > 0 &&
                rows % down == 0 && rows / down % kRowsTogether == 0,
            "whole-number weights need bfloat16 scales for each column, one for a multiple of 32 "
            "rows");
    view.scale_rows = rows / down;
  }
  view.scales = data<char>(scales);
  view.scale_stride = across;
  view.scale_matrix = down * across * (blocks ? 4 : 2);
  return view;
}

int64_t rows_of_weights(TF_Tensor* tensor) {
  return TF_Dim(tensor, TF_NumDims(tensor) - 2) * rows_a_byte(type_of(TF_TensorType(tensor)));
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

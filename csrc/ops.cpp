// The operators hut_cuda::*, which hut_kernels/cuda.py calls: arguments checked, workspaces
// allocated, kernels launched, products left to torch's dispatcher.
//
// They are not public: the public operators are hut::*, defined in hut_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "launch.h"
#include "runtime.h"

namespace hut {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{from(arguments)...};
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call("aten::linear", "", x, weight, bias);
}

// The stable ABI cannot pass a Scalar, so aten::add's alpha is unavailable: subtract -1 times it.
Tensor sum(const Tensor& left, const Tensor& right) {
  return torch::stable::subtract(left, right, -1.0);
}

// left^T right, with float32 sums and a float32 result.
Tensor gram(const Tensor& left, const Tensor& right) {
  const Tensor transposed = torch::stable::transpose(left, 0, 1);
  if (left.scalar_type() == ScalarType::Float) return call("aten::mm", "", transposed, right);
  return call("aten::mm", "dtype", transposed, right, ScalarType::Float);
}

Tensor empty_like(const Tensor& tensor, ScalarType type) {
  return call(
      "aten::empty_like", "", tensor, std::optional(type),
      std::optional<torch::headeronly::Layout>(), std::optional<torch::stable::Device>(),
      std::optional<bool>(), std::optional<torch::headeronly::MemoryFormat>());
}

Tensor empty_float32(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "hut_kernels: the CUDA kernels take float32, float16 and bfloat16");
  }
}

Type type_of(const Tensor& tensor) { return type_of(tensor.scalar_type()); }

Vector vector_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, 0, Type::kFloat32};
  return {tensor->const_data_ptr(), tensor->stride(0), type_of(*tensor)};
}

// gamma * bias + beta, to be written to a contiguous `out`.
EffectiveBias writing(
    const Tensor& out, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta) {
  return {vector_of(bias), vector_of(gamma), vector_of(beta), out.mutable_data_ptr(), type_of(out),
          out.size(0)};
}

// True if eight neighbors in a row can be moved at once: rows contiguous, each from 16 bytes.
bool packed(const void* data, int64_t row_stride, int64_t column_stride, int64_t element_size) {
  return column_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         row_stride * element_size % 16 == 0;
}

void check_vector(const std::optional<Tensor>& vector, int64_t size, const char* name) {
  if (!vector) return;
  check_device(*vector, name);
  STD_TORCH_CHECK(
      vector->dim() == 1 && vector->size(0) == size, "hut_kernels: ", name, " must have ", size,
      " elements, weight's out_features");
}

// A layer's parameters as the kernels see them. Rows and columns are those of the storage: a weight
// stored [in, out], which its strides tell, is `transposed`, and then its rows are the inputs.
class Layer {
 public:
  Layer(
      const Tensor& weight, const Tensor& hut_A, const Tensor& hut_B,
      const std::optional<Tensor>& gamma, bool two_sided, double constant, double scaling)
      : weight_(weight), two_sided_(two_sided) {
    check_device(weight, "weight");
    check_device(hut_A, "hut_A");
    check_device(hut_B, "hut_B");
    STD_TORCH_CHECK(
        weight.dim() == 2 && hut_A.dim() == 2 && hut_B.dim() == 2,
        "hut_kernels: weight, hut_A and hut_B must have 2 dimensions");
    const int64_t outputs = weight.size(0), inputs = weight.size(1), r = hut_A.size(0);
    STD_TORCH_CHECK(weight.numel() > 0, "hut_kernels: weight must not be empty");
    STD_TORCH_CHECK(
        hut_A.size(1) == inputs && hut_B.size(0) == outputs && hut_B.size(1) == r,
        "hut_kernels: hut_A must be [r, in_features] and hut_B [out_features, r] for a weight [",
        outputs, ", ", inputs, "]; got [", r, ", ", hut_A.size(1), "] and [", hut_B.size(0), ", ",
        hut_B.size(1), "]");
    STD_TORCH_CHECK(
        r >= 1 && r <= (1 << 20), "hut_kernels: r must be between 1 and 2^20; got ", r);
    STD_TORCH_CHECK(
        !two_sided || (r <= inputs && r <= outputs),
        "hut_kernels: two_sided needs r <= min(in_features, out_features)");
    STD_TORCH_CHECK(
        !two_sided || constant == 0.0, "hut_kernels: two_sided has no constant; got ", constant);
    check_vector(gamma, outputs, "gamma");
    const Side output{
        outputs, {hut_B.const_data_ptr(), hut_B.stride(0), hut_B.stride(1), type_of(hut_B)},
        vector_of(gamma)};
    const Side input{
        inputs, {hut_A.const_data_ptr(), hut_A.stride(1), hut_A.stride(0), type_of(hut_A)},
        vector_of(std::nullopt)};
    transposed_ = weight.stride(0) < weight.stride(1);
    multiplier_ = {
        {transposed_ ? input : output, transposed_ ? output : input}, static_cast<int>(r),
        static_cast<float>(constant), static_cast<float>(scaling)};
  }

  const Multiplier& multiplier() const { return multiplier_; }
  bool two_sided() const { return two_sided_; }
  int output_side() const { return transposed_ ? 1 : 0; }
  Type type() const { return type_of(weight_); }
  int64_t row_stride() const { return weight_.stride(output_side()); }
  int64_t column_stride() const { return weight_.stride(1 - output_side()); }
  int64_t rows() const { return multiplier_.side[0].size; }
  int64_t columns() const { return multiplier_.side[1].size; }

  // W0 from a row on.
  const void* weight(int64_t row) const {
    return static_cast<const char*>(weight_.const_data_ptr()) + row * row_stride() * item();
  }

  bool weight_packed(const void* from) const {
    return packed(from, row_stride(), column_stride(), item());
  }

  // gamma (W0 * T), or gamma (W0 * (T - 1)), in `type`, with weight's strides; writes the effective
  // bias as well.
  Tensor stage(
      ScalarType type, bool exact, bool subtract_identity, const EffectiveBias& bias,
      void* stream) const {
    Multiplier multiplier = multiplier_;
    if (subtract_identity) multiplier.constant -= 1.0f;
    return launch(multiplier, type, two_sided_, exact, bias, stream);
  }

  // gamma W0 in `type`, which is T = 1 and no factor; W0 itself where nothing has to change.
  Tensor base(ScalarType type, void* stream) const {
    const bool scaled = multiplier_.side[output_side()].gamma.data != nullptr;
    if (!scaled && weight_.scalar_type() == type) return weight_;
    Multiplier one = multiplier_;
    one.r = 0;
    one.constant = 1.0f;
    return launch(one, type, false, true, EffectiveBias{}, stream);
  }

 private:
  int64_t item() const { return static_cast<int64_t>(weight_.element_size()); }

  Tensor launch(
      const Multiplier& multiplier, ScalarType type, bool two_sided, bool exact,
      const EffectiveBias& bias, void* stream) const {
    const Tensor out = empty_like(weight_, type);
    const int64_t out_row = out.stride(output_side()), out_column = out.stride(1 - output_side());
    const WeightArguments arguments{
        multiplier,
        bias,
        weight(0),
        out.mutable_data_ptr(),
        {row_stride(), column_stride()},
        {out_row, out_column},
        weight_packed(weight(0)),
        packed(out.const_data_ptr(), out_row, out_column, out.element_size())};
    launch_weight(arguments, this->type(), type_of(type), two_sided, exact, stream);
    return out;
  }

  Tensor weight_;
  bool two_sided_, transposed_;
  Multiplier multiplier_;
};

Tensor weight(
    const Tensor& weight, const Tensor& hut_A, const Tensor& hut_B,
    const std::optional<Tensor>& gamma, bool two_sided, double constant, double scaling,
    ScalarType dtype) {
  const Layer layer(weight, hut_A, hut_B, gamma, two_sided, constant, scaling);
  const OnDevice device(weight);
  return layer.stage(dtype, true, false, EffectiveBias{}, device.stream());
}

Tensor forward(
    const Tensor& x, const Tensor& weight, const Tensor& hut_A, const Tensor& hut_B,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, bool two_sided, double constant, double scaling,
    bool split) {
  const Layer layer(weight, hut_A, hut_B, gamma, two_sided, constant, scaling);
  const int64_t outputs = weight.size(0);
  check_device(x, "x");
  check_vector(bias, outputs, "bias");
  check_vector(beta, outputs, "beta");
  const OnDevice device(x);
  const ScalarType type = x.scalar_type();

  // gamma * bias + beta; a bias alone is the product's own where it has the type.
  std::optional<Tensor> total = bias;
  EffectiveBias effective{};
  if (beta || (bias && (gamma || bias->scalar_type() != type))) {
    total = torch::stable::new_empty(x, {outputs});
    effective = writing(*total, bias, gamma, beta);
  }
  const Tensor W = layer.stage(type, false, split, effective, device.stream());
  if (!split) return linear(x, W, total);
  const Tensor y = linear(x, layer.base(type, device.stream()), total);
  return sum(y, linear(x, W, std::nullopt));
}

// dx = (gamma * grad) W.
Tensor grad_input(const Tensor& grad, const Layer& layer, bool split, void* stream) {
  const ScalarType type = grad.scalar_type();
  const Tensor W = layer.stage(type, false, split, EffectiveBias{}, stream);
  if (!split) return torch::stable::matmul(grad, W);
  const Tensor dx = torch::stable::matmul(grad, layer.base(type, stream));
  return sum(dx, torch::stable::matmul(grad, W));
}

// [..., size] as [N, size].
Tensor as_rows(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  return torch::stable::reshape(tensor, {-1, tensor.size(tensor.dim() - 1)});
}

// d hut_A, d hut_B and sum_i W[o, i] G[o, i], those needed, in this order.
//
// chunk: rows of G made at a time. splits: of the rows' side and of the columns' side, how many
// blocks share each of its sums.
std::vector<Tensor> grad_factors(
    const Tensor& grad, const Tensor& x, const Tensor& hut_A, const Tensor& hut_B,
    const Layer& layer, bool need_A, bool need_B, bool need_gamma, int64_t chunk,
    std::array<int64_t, 2> splits, void* stream) {
  const Multiplier& m = layer.multiplier();
  const int output = layer.output_side(), input = 1 - output;
  const bool needed[2] = {
      output == 0 ? need_B || need_gamma : need_A, output == 0 ? need_A : need_B || need_gamma};

  ReduceArguments reduce{};
  reduce.multiplier = m;
  reduce.weight_strides[0] = layer.row_stride();
  reduce.weight_strides[1] = layer.column_stride();
  reduce.sums[output] = need_gamma && m.constant != 0.0f;
  std::array<std::optional<Tensor>, 2> partials;
  for (int s = 0; s < 2; ++s) {
    reduce.splits[s] = static_cast<int>(splits[s]);
    if (!needed[s]) continue;
    partials[s] = empty_float32(x, {splits[s], m.r + reduce.sums[s], m.side[s].size});
    reduce.partials[s] = static_cast<float*>(partials[s]->mutable_data_ptr());
  }

  const Tensor x_rows = as_rows(x), grad_rows = as_rows(grad);
  const Tensor &left = output == 0 ? grad_rows : x_rows, &right = output == 0 ? x_rows : grad_rows;
  for (int64_t row = 0; row < layer.rows(); row += chunk) {
    const int64_t rows = layer.rows() - row < chunk ? layer.rows() - row : chunk;
    Tensor part = left;
    const Tensor G = gram(
        rows == layer.rows() ? left : torch::stable::narrow(part, 1, row, rows), right);
    reduce.G = static_cast<const float*>(G.const_data_ptr());
    reduce.G_packed = packed(reduce.G, layer.columns(), 1, sizeof(float));
    reduce.weight = layer.weight(row);
    reduce.weight_packed = layer.weight_packed(reduce.weight);
    reduce.first_row = row;
    reduce.rows = rows;
    launch_reduce(
        reduce, layer.type(), layer.two_sided(), x.scalar_type() == ScalarType::Float, stream);
  }

  FinishArguments finish{};
  finish.multiplier = m;
  finish.output_side = output;
  for (int s = 0; s < 2; ++s) {
    finish.partials[s] = reduce.partials[s];
    finish.splits[s] = reduce.splits[s];
    finish.sums[s] = reduce.sums[s];
  }
  std::vector<Tensor> gradients;
  const auto gradient = [&](const Tensor& factor, int side, int index_dimension) {
    Tensor made = torch::stable::new_empty(factor, factor.sizes());
    finish.gradient[side] = made.mutable_data_ptr();
    finish.index_strides[side] = made.stride(index_dimension);
    finish.r_strides[side] = made.stride(1 - index_dimension);
    finish.types[side] = type_of(made);
    gradients.push_back(made);
  };
  if (need_A) gradient(hut_A, input, 1);
  if (need_B) gradient(hut_B, output, 0);
  if (need_gamma) {
    gradients.push_back(empty_float32(x, {m.side[output].size}));
    finish.gamma_gradient = static_cast<float*>(gradients.back().mutable_data_ptr());
  }
  launch_finish(finish, stream);
  return gradients;
}

std::vector<Tensor> backward(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& hut_A,
    const Tensor& hut_B, const std::optional<Tensor>& gamma, bool two_sided, double constant,
    double scaling, bool split, bool need_x, bool need_A, bool need_B, bool need_gamma,
    int64_t chunk, int64_t row_splits, int64_t column_splits) {
  const Layer layer(weight, hut_A, hut_B, gamma, two_sided, constant, scaling);
  check_device(grad, "grad");
  const OnDevice device(grad);
  std::vector<Tensor> gradients;
  if (need_x) gradients.push_back(grad_input(grad, layer, split, device.stream()));
  if (need_A || need_B || need_gamma) {
    STD_TORCH_CHECK(x.has_value(), "hut_kernels: the factors' gradients need x");
    STD_TORCH_CHECK(
        chunk > 0 && row_splits > 0 && column_splits > 0,
        "hut_kernels: chunk and splits must be positive");
    check_device(*x, "x");
    for (const Tensor& factor : grad_factors(
             grad, *x, hut_A, hut_B, layer, need_A, need_B, need_gamma, chunk,
             {row_splits, column_splits}, device.stream()))
      gradients.push_back(factor);
  }
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY(hut_cuda, m) {
  m.def(
      "forward(Tensor x, Tensor weight, Tensor hut_A, Tensor hut_B, Tensor? bias, Tensor? gamma, "
      "Tensor? beta, bool two_sided, float constant, float scaling, bool split) -> Tensor");
  m.def(
      "backward(Tensor grad, Tensor? x, Tensor weight, Tensor hut_A, Tensor hut_B, Tensor? gamma, "
      "bool two_sided, float constant, float scaling, bool split, bool need_x, bool need_A, "
      "bool need_B, bool need_gamma, int chunk, int row_splits, int column_splits) -> Tensor[]");
  m.def(
      "weight(Tensor weight, Tensor hut_A, Tensor hut_B, Tensor? gamma, "
      "bool two_sided, float constant, float scaling, ScalarType dtype) -> Tensor");
}

// For tensors anywhere, so that one on the wrong device meets check_device and its sentence.
STABLE_TORCH_LIBRARY_IMPL(hut_cuda, CompositeExplicitAutograd, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("weight", TORCH_BOX(&weight));
}

}  // namespace hut

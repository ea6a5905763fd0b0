// Torch's tensors and the registration of operators, over torch's stable C interface alone: one library serves
// every torch from TORCH_TARGET_VERSION on, and every Python.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Python's own interface, of which only an exception is needed; the same in every version of Python.
extern "C" {
extern struct _object* PyExc_TypeError;
void PyErr_SetString(struct _object* type, const char* message);
}

// What torch's translator of exceptions asks for the kind of error: torch's stable interface has none for
// TypeError. Not recognised, it is a RuntimeError with the same message.
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace llm42::bind {

using torch::headeronly::ScalarType;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using Library = torch::stable::detail::StableLibrary;
using Dims = std::vector<int64_t>;

inline constexpr ScalarType kByte = ScalarType::Byte, kInt = ScalarType::Int, kLong = ScalarType::Long,
                            kHalf = ScalarType::Half, kBFloat16 = ScalarType::BFloat16, kFloat = ScalarType::Float,
                            kDouble = ScalarType::Double, kBool = ScalarType::Bool;

// A Python TypeError; std::invalid_argument is a ValueError, std::out_of_range an IndexError.
class TypeError : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_TypeError, what()); }
};

inline Dims dims_of(IntArrayRef sizes) { return {sizes.begin(), sizes.end()}; }
inline bool same(IntArrayRef a, IntArrayRef b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

struct Shown {
  IntArrayRef sizes;
};

inline std::ostream& operator<<(std::ostream& out, const Shown& shown) {
  out << '[';
  for (size_t i = 0; i < shown.sizes.size(); i++) out << (i ? ", " : "") << shown.sizes[i];
  return out << ']';
}

template <class T>
inline const T& shown(const T& value) {
  return value;
}
inline Shown shown(const IntArrayRef& sizes) { return {sizes}; }
inline Shown shown(const Dims& sizes) { return {sizes}; }

template <class... Parts>
inline std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << shown(parts));
  return out.str();
}

#define CHECK_OR_THROW(error, condition, ...) \
  if (__builtin_expect(!(condition), 0)) throw error(::llm42::bind::message(__VA_ARGS__))
#define CHECK_VALUE(condition, ...) CHECK_OR_THROW(std::invalid_argument, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) CHECK_OR_THROW(::llm42::bind::TypeError, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) CHECK_OR_THROW(std::out_of_range, condition, __VA_ARGS__)

// A reference to one of torch's tensors, or to none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : held_(owned) {}
  Tensor(torch::stable::Tensor held) : held_(std::move(held)) {}

  bool defined() const { return held_.has_value(); }
  AtenTensorHandle get() const { return held_->get(); }
  const torch::stable::Tensor& held() const { return *held_; }

  int64_t dim() const { return held_->dim(); }
  int64_t numel() const { return held_->numel(); }
  IntArrayRef sizes() const { return held_->sizes(); }
  int64_t size(int64_t dim) const { return held_->size(dim); }
  int64_t stride(int64_t dim) const { return held_->stride(dim); }
  bool is_contiguous() const { return held_->is_contiguous(); }
  ScalarType scalar_type() const { return held_->scalar_type(); }
  int64_t element_size() const { return int64_t(held_->element_size()); }

  bool is_floating_point() const {
    const ScalarType type = scalar_type();
    return type == kFloat || type == kBFloat16 || type == kHalf || type == kDouble;
  }

  template <class T = void>
  const T* const_data_ptr() const {
    return static_cast<const T*>(std::as_const(*held_).const_data_ptr());
  }
  template <class T = void>
  T* mutable_data_ptr() const {
    return static_cast<T*>(held_->mutable_data_ptr());
  }

  Tensor contiguous() const { return is_contiguous() ? *this : Tensor(torch::stable::contiguous(*held_)); }
  Tensor to(ScalarType type) const { return scalar_type() == type ? *this : Tensor(torch::stable::to(*held_, type)); }
  Tensor transpose(int64_t a, int64_t b) const { return torch::stable::transpose(*held_, a, b); }
  Tensor permute(IntArrayRef order) const {
    return called("aten::permute", "", torch::stable::detail::from(*held_), torch::stable::detail::from(order));
  }
  Tensor movedim(int64_t from, int64_t to) const {
    return called("aten::movedim", "int", torch::stable::detail::from(*held_), torch::stable::detail::from(from),
                  torch::stable::detail::from(to));
  }
  Tensor expand(IntArrayRef sizes) const {
    return called("aten::expand", "", torch::stable::detail::from(*held_), torch::stable::detail::from(sizes),
                  torch::stable::detail::from(false));
  }

 private:
  template <class... Values>
  static Tensor called(const char* name, const char* overload, Values... values) {
    std::array<StableIValue, sizeof...(Values)> stack{values...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  }

  std::optional<torch::stable::Tensor> held_;
};

// A contiguous tensor of the CPU; what is in it is undefined.
inline Tensor empty(IntArrayRef sizes, ScalarType type) {
  Dims strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline int num_threads() { return int(torch::stable::get_num_threads()); }

struct Text {
  std::string value;
};

}  // namespace llm42::bind

namespace torch::stable::detail {

template <>
struct ToImpl<llm42::bind::Tensor> {
  static llm42::bind::Tensor call(StableIValue value, uint64_t, bool) {
    return llm42::bind::Tensor(to<AtenTensorHandle>(value));
  }
};

template <>
struct FromImpl<llm42::bind::Tensor> {
  static StableIValue call(const llm42::bind::Tensor& value, uint64_t, bool) { return from(value.held()); }
};

// Torch's own conversion to std::string loses the memory of one with each call.
template <>
struct ToImpl<llm42::bind::Text> {
  static llm42::bind::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    llm42::bind::Text text{{data, length}};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail

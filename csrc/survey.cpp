#include "survey.h"

#include <dlfcn.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"

namespace nb = nanobind;

namespace asyncckpt {
namespace {

constexpr size_t kLine = 64;  // of a cache

// The table for our major version; null if there is none.
const dlpack::ExchangeApi* exchange_api(nb::handle capsule) {
  const void* found = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  if (found == nullptr) throw nb::python_error();
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(found);
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->older;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

// What torch's own attributes call in the end: its C++ functions, by their names. By way of python each takes some
// fifty nanoseconds, most of them for what stands around it; so, five.
//
// They take the address of an `at::Tensor`, which is where an object keeps its body, or of the body, a
// `c10::TensorImpl`. Their names say what they take, not what they return: `inside_agrees` in asyncckpt/survey.py
// finds out.
struct Inside {
  int64_t (*version)(const void* tensor) = nullptr;
  bool (*is_neg)(const void* tensor) = nullptr;
  bool (*requires_grad)(const void* body) = nullptr;

  // In the library that the table's functions are of, and in those that it needs.
  explicit Inside(const dlpack::ExchangeApi& api) {
    Dl_info where;
    if (dladdr(reinterpret_cast<void*>(api.tensor_from_object), &where) == 0) return;
    void* const library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return;
    find(library, "_ZNK2at10TensorBase8_versionEv", &version);
    find(library, "_ZN2at6native6is_negERKNS_6TensorE", &is_neg);
    find(library, "_ZNK3c1010TensorImpl13requires_gradEv", &requires_grad);
    dlclose(library);  // torch itself keeps it
  }
  bool is_complete() const {
    return version != nullptr && is_neg != nullptr && requires_grad != nullptr;
  }

 private:
  template <typename Function>
  static void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
  }
};

// Looked for once.
const Inside* inside_of(const dlpack::ExchangeApi& api) {
  static const Inside found(api);
  return found.is_complete() ? &found : nullptr;
}

// The types that objects are asked to have, exactly.
class Types {
 public:
  explicit Types(nb::tuple types) : types_(std::move(types)) {
    if (types_.size() == 0) throw nb::value_error("no types of tensors");
  }
  bool have(const PyObject* object) const {
    for (nb::handle type : types_)
      if (reinterpret_cast<PyTypeObject*>(type.ptr()) == Py_TYPE(object)) return true;
    return false;
  }
  // What all of them have under a name, if that is one and the same C function for objects of their kind.
  nb::object shared(nb::handle name, const PyTypeObject* descriptor) const {
    nb::object found;
    for (nb::handle type : types_) {
      nb::object one = nb::steal(PyObject_GetAttr(type.ptr(), name.ptr()));
      if (!one.is_valid()) throw nb::python_error();
      if (Py_TYPE(one.ptr()) != descriptor || (found.is_valid() && !found.is(one))) return {};
      auto* const of = reinterpret_cast<PyDescrObject*>(one.ptr())->d_type;
      if (!PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()), of)) return {};
      found = std::move(one);
    }
    return found;
  }

 private:
  nb::tuple types_;
};

// An attribute of objects of these types. Where it is torch's own, its C function is looked up once: to find it
// anew for each of thousands of tensors takes longer than the function does.
class Attribute {
 public:
  Attribute(const Types& types, const char* name)
      : name_(nb::steal(PyUnicode_InternFromString(name))),
        found_(types.shared(name_, &PyGetSetDescr_Type)) {}

  bool is_torchs_own() const { return found_.is_valid(); }

  nb::object operator()(PyObject* object) const {
    const PyGetSetDef* const own =
        found_.is_valid() ? reinterpret_cast<PyGetSetDescrObject*>(found_.ptr())->d_getset
                          : nullptr;
    const nb::object answer =
        nb::steal(own != nullptr && own->get != nullptr ? own->get(object, own->closure)
                                                        : PyObject_GetAttr(object, name_.ptr()));
    if (!answer.is_valid()) throw nb::python_error();
    return answer;
  }

 private:
  nb::object name_, found_;
};

// The same for a method without arguments.
class Method {
 public:
  Method(const Types& types, const char* name)
      : name_(nb::steal(PyUnicode_InternFromString(name))),
        found_(types.shared(name_, &PyMethodDescr_Type)) {}

  bool is_torchs_own() const { return found_.is_valid(); }

  nb::object operator()(PyObject* object) const {
    const PyMethodDef* const own =
        found_.is_valid() ? reinterpret_cast<PyMethodDescrObject*>(found_.ptr())->d_method
                          : nullptr;
    const nb::object answer = nb::steal(own != nullptr && own->ml_flags == METH_NOARGS
                                            ? own->ml_meth(object, nullptr)
                                            : PyObject_CallMethodNoArgs(object, name_.ptr()));
    if (!answer.is_valid()) throw nb::python_error();
    return answer;
  }

 private:
  nb::object name_, found_;
};

int64_t number_of(const nb::object& answer) {
  const int64_t number = PyLong_AsLongLong(answer.ptr());
  if (number == -1 && PyErr_Occurred()) throw nb::python_error();
  return number;
}

// What the first word behind an object's head is, if that is where torch keeps the address of what the object
// stands for; null otherwise.
const char* body_of(const PyObject* object) {
  const char* body = nullptr;
  if (Py_TYPE(object)->tp_basicsize >= static_cast<Py_ssize_t>(sizeof(PyObject) + sizeof(body)))
    std::memcpy(&body, object + 1, sizeof(body));
  return body;
}

// The address of an object's `at::Tensor`, which is nothing but that word.
const void* tensor_of(const PyObject* object) { return object + 1; }

// What DLPack does not say. Torch's functions are called if they may be, and if nobody put something else in the
// place of an attribute that stands for one of them.
class Asked {
 public:
  Asked(const Types& types, const Inside* inside)
      : version_(types, "_version"),
        requires_grad_(types, "requires_grad"),
        is_neg_(types, "is_neg"),
        inside_(version_.is_torchs_own() && requires_grad_.is_torchs_own() &&
                        is_neg_.is_torchs_own()
                    ? inside
                    : nullptr) {}

  bool is_inside() const { return inside_ != nullptr; }

  int64_t version(PyObject* object) const {
    if (inside_ == nullptr) return number_of(version_(object));
    try {
      return inside_->version(tensor_of(object));
    } catch (const std::exception&) {  // it has none; python says that without torch's stack
      return number_of(version_(object));
    }
  }
  bool requires_grad(PyObject* object) const {
    return inside_ != nullptr ? inside_->requires_grad(body_of(object))
                              : requires_grad_(object).is(nb::handle(Py_True));
  }
  bool is_neg(PyObject* object) const {
    return inside_ != nullptr ? inside_->is_neg(tensor_of(object))
                              : is_neg_(object).is(nb::handle(Py_True));
  }

 private:
  Attribute version_, requires_grad_;
  Method is_neg_;
  const Inside* inside_;
};

template <typename Number>
nb::object as_array(std::unique_ptr<Number[]> numbers, size_t count) {
  nb::capsule owner(numbers.get(), [](void* p) noexcept { delete[] static_cast<Number*>(p); });
  Number* const first = numbers.release();
  return nb::cast(nb::ndarray<nb::numpy, Number, nb::ndim<1>>(first, {count}, owner));
}

// Appends device, dtype and shape; returns whether it is dense, as far as DLPack says.
bool append_form(const dlpack::Tensor& tensor, std::vector<int64_t>* forms) {
  bool dense = tensor.code != dlpack::kComplex;
  forms->push_back(int64_t{tensor.device_type} << 32 | tensor.device_id);
  forms->push_back(int64_t{tensor.code} << 32 | tensor.bits << 16 | tensor.lanes);
  forms->push_back(tensor.ndim);
  int64_t stride = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    dense = dense && tensor.strides[d] == stride;
    forms->push_back(tensor.shape[d]);
    stride *= std::max<int64_t>(tensor.shape[d], 1);
  }
  return dense;
}

// What is looked at next is on its way from memory meanwhile, a step deeper each time: the object, its body, and
// what the first words of that point to (its memory, its version). A word that is prefetched may be anything;
// bodies alone are read, where `has_bodies` says that there are any.
void prefetch(nb::list objects, size_t index, const Types& types, bool has_bodies) {
  constexpr size_t kAhead = 8, kBody = 4 * kLine, kFirst = 2, kLast = 6;
  const size_t count = objects.size();
  const auto at = [&](size_t place) {
    return PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(place));
  };
  const auto body_at = [&](size_t place) {
    return place < count && types.have(at(place)) ? body_of(at(place)) : nullptr;
  };
  if (index + 3 * kAhead < count) __builtin_prefetch(at(index + 3 * kAhead));
  if (!has_bodies) return;
  if (const char* const body = body_at(index + 2 * kAhead))
    for (size_t offset = 0; offset < kBody; offset += kLine) __builtin_prefetch(body + offset);
  if (const char* const body = body_at(index + kAhead)) {
    const char* words[kLast - kFirst];  // the first two are its type and its count of references
    std::memcpy(words, body + kFirst * sizeof(char*), sizeof(words));
    for (const char* word : words) __builtin_prefetch(word);
  }
}

// Whether that is the layout of these objects: torch says the address of one's body itself. Up to torch 2.9 it is
// another.
bool have_bodies(nb::list objects, const Types& types) {
  if (objects.size() == 0) return false;
  PyObject* const first = PyList_GET_ITEM(objects.ptr(), 0);
  if (!types.have(first)) return false;
  const nb::object said = nb::steal(PyObject_GetAttrString(first, "_cdata"));
  if (!said.is_valid()) throw nb::python_error();
  const void* const body = PyLong_AsVoidPtr(said.ptr());
  if (body == nullptr && PyErr_Occurred()) throw nb::python_error();
  return body == body_of(first);
}

}  // namespace

nb::object survey(nb::list tensors, nb::tuple kinds, nb::handle capsule, bool with_forms,
                  bool with_storages, bool inside) {
  const dlpack::ExchangeApi* const api = exchange_api(capsule);
  if (api == nullptr || api->tensor_from_object == nullptr) return nb::none();
  const Types types(kinds);
  const bool has_bodies = have_bodies(tensors, types);
  const Asked asked(types, inside && has_bodies ? inside_of(*api) : nullptr);
  const Method untyped_storage(types, "untyped_storage");
  const size_t count = tensors.size();
  auto addresses = std::make_unique<uint64_t[]>(count);
  auto versions = std::make_unique<int64_t[]>(count);
  std::vector<int64_t> forms;
  if (with_forms) forms.reserve(count * 6);
  nb::list storages;
  for (size_t i = 0; i < count; ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (!types.have(tensor)) throw nb::type_error("not one of these kinds of tensors");
    prefetch(tensors, i, types, has_bodies);
    dlpack::Tensor seen;
    if (api->tensor_from_object(tensor, &seen) != 0) throw nb::python_error();
    addresses[i] = reinterpret_cast<uintptr_t>(seen.data) + seen.byte_offset;
    if (with_forms) {
      const bool dense = append_form(seen, &forms);
      forms.push_back(asked.requires_grad(tensor));
      if (!dense || asked.is_neg(tensor)) throw nb::value_error("a tensor is not dense");
    }
    versions[i] = asked.version(tensor);
    if (with_storages) storages.append(untyped_storage(tensor));
  }
  return nb::make_tuple(as_array(std::move(addresses), count), as_array(std::move(versions), count),
                        nb::bytes(forms.data(), forms.size() * sizeof(int64_t)), storages,
                        asked.is_inside());
}

}  // namespace asyncckpt

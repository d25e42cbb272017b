#include "survey.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"

namespace nb = nanobind;

namespace asyncckpt {
namespace {

constexpr size_t kLine = 64;  // of a cache

// ---- survey -------------------------------------------------------------------------------------

// The table for our major version; null if there is none.
const dlpack::ExchangeApi* exchange_api(nb::handle capsule) {
  const void* found = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  if (found == nullptr) throw nb::python_error();
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(found);
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->older;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

// An attribute or a method without arguments of the library's own type, looked up once: its C function takes
// a fraction of the time that finding it anew for each of thousands of tensors does.
class Asked {
 public:
  Asked(nb::handle kind, const char* name)
      : name_(nb::steal(PyUnicode_InternFromString(name))),
        found_(nb::steal(PyObject_GetAttr(kind.ptr(), name_.ptr()))) {
    if (!found_.is_valid()) throw nb::python_error();
    if (Py_TYPE(found_.ptr()) == &PyGetSetDescr_Type) {
      getter_ = reinterpret_cast<PyGetSetDescrObject*>(found_.ptr())->d_getset;
    } else if (Py_TYPE(found_.ptr()) == &PyMethodDescr_Type) {
      const PyMethodDef* const method =
          reinterpret_cast<PyMethodDescrObject*>(found_.ptr())->d_method;
      if (method->ml_flags == METH_NOARGS) method_ = method->ml_meth;
      is_method_ = true;
    }
  }

  // Of an object of that kind.
  nb::object operator()(PyObject* object) const {
    const nb::object answer = nb::steal(ask(object));
    if (!answer.is_valid()) throw nb::python_error();
    return answer;
  }

 private:
  PyObject* ask(PyObject* object) const {
    if (getter_ != nullptr && getter_->get != nullptr)
      return getter_->get(object, getter_->closure);
    if (method_ != nullptr) return method_(object, nullptr);
    if (is_method_) return PyObject_CallMethodNoArgs(object, name_.ptr());
    return PyObject_GetAttr(object, name_.ptr());
  }

  nb::object name_, found_;
  const PyGetSetDef* getter_ = nullptr;
  PyCFunction method_ = nullptr;
  bool is_method_ = false;
};

int64_t number_of(const nb::object& answer) {
  const int64_t number = PyLong_AsLongLong(answer.ptr());
  if (number == -1 && PyErr_Occurred()) throw nb::python_error();
  return number;
}

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

// The types that objects are asked to have, exactly.
struct Kinds {
  explicit Kinds(nb::tuple kinds) {
    for (nb::handle kind : kinds)
      known.push_back(reinterpret_cast<const PyTypeObject*>(kind.ptr()));
  }
  bool have(const PyObject* object) const {
    return std::find(known.begin(), known.end(), Py_TYPE(object)) != known.end();
  }
  std::vector<const PyTypeObject*> known;
};

// What is looked at next is on its way from memory meanwhile, a step deeper each time: the object, what its
// first word points to, and what the first words of that point to (its memory, its version). Words that are
// no addresses do no harm; of an object that is none of the known kinds, nothing is read.
void prefetch(nb::list objects, size_t index, const Kinds& kinds) {
  constexpr size_t kAhead = 8, kBody = 4 * kLine, kFirst = 2, kLast = 6;
  const size_t count = objects.size();
  const auto at = [&](size_t place) {
    return PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(place));
  };
  const auto body_at = [&](size_t place) {
    const char* body = nullptr;
    if (place < count && kinds.have(at(place)) &&
        Py_TYPE(at(place))->tp_basicsize >=
            static_cast<Py_ssize_t>(sizeof(PyObject) + sizeof(body)))
      std::memcpy(&body, at(place) + 1, sizeof(body));
    return body;
  };
  if (index + 3 * kAhead < count) __builtin_prefetch(at(index + 3 * kAhead));
  if (const char* const body = body_at(index + 2 * kAhead))
    for (size_t offset = 0; offset < kBody; offset += kLine) __builtin_prefetch(body + offset);
  if (const char* const body = body_at(index + kAhead)) {
    const char* words[kLast];
    std::memcpy(words, body, sizeof(words));
    for (size_t word = kFirst; word < kLast; ++word) __builtin_prefetch(words[word]);
  }
}

// ---- columns ------------------------------------------------------------------------------------

void prefetch_lines(const void* begin, size_t lines) {
  for (size_t line = 0; line < lines; ++line)
    __builtin_prefetch(static_cast<const char*>(begin) + line * kLine);
}

// What a lookup in a dictionary that is there already reads next.
void prefetch_inside(PyObject* object) {
  if (!PyDict_Check(object)) return;
  const auto* const dict = reinterpret_cast<const PyDictObject*>(object);
  prefetch_lines(dict->ma_values != nullptr ? static_cast<const void*>(dict->ma_values)
                                            : static_cast<const void*>(dict->ma_keys),
                 4);
}

// One of the dictionaries that each object has, over all of them.
struct Column {
  std::string lengths;  // int64 each
  nb::list keys;
  std::string is_there;  // a byte each: whether there is something under a key
  nb::list values;       // what is there

  void append(nb::handle dict) {
    Py_ssize_t length = 0;
    if (PyDict_CheckExact(dict.ptr())) {
      length = PyDict_GET_SIZE(dict.ptr());
      PyObject *key = nullptr, *value = nullptr;
      for (Py_ssize_t place = 0; PyDict_Next(dict.ptr(), &place, &key, &value);) append(key, value);
    } else {  // it may have an order of its own
      const nb::list items = nb::steal<nb::list>(PyMapping_Items(dict.ptr()));
      if (!items.is_valid()) throw nb::python_error();
      length = static_cast<Py_ssize_t>(items.size());
      for (nb::handle item : items) append(item[0].ptr(), item[1].ptr());
    }
    const int64_t number = length;
    lengths.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }

  void append(PyObject* key, PyObject* value) {
    keys.append(nb::handle(key));
    is_there.push_back(value != Py_None);
    if (value != Py_None) values.append(nb::handle(value));
  }

  nb::tuple made() const {
    return nb::make_tuple(nb::bytes(lengths.data(), lengths.size()), keys,
                          nb::bytes(is_there.data(), is_there.size()), values);
  }
};

// The value under a name; null if there is none.
PyObject* found_in(nb::handle dict, nb::handle name) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), name.ptr());
  if (found == nullptr && PyErr_Occurred()) throw nb::python_error();
  return found;
}

bool is_true(nb::handle value) {
  const int answer = PyObject_IsTrue(value.ptr());
  if (answer < 0) throw nb::python_error();
  return answer != 0;
}

}  // namespace

bool Known::has(size_t place, PyObject* tensor, uint64_t address) const {
  if (place >= found_.size() || found_[place].second != address) return false;
  PyObject* const reference = found_[place].first.ptr();
  if (reference == nullptr) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* there = nullptr;
  if (PyWeakref_GetRef(reference, &there) < 0) throw nb::python_error();
  const nb::object held = nb::steal(there);
  return there == tensor;
#else
  return PyWeakref_GET_OBJECT(reference) == tensor;
#endif
}

void Known::note(size_t place, PyObject* tensor, uint64_t address) {
  nb::object reference = nb::steal(PyWeakref_NewRef(tensor, nullptr));
  if (!reference.is_valid()) throw nb::python_error();
  if (place >= found_.size()) found_.resize(place + 1);
  found_[place] = {std::move(reference), address};
}

nb::object survey(nb::list tensors, nb::tuple types, nb::handle capsule, bool with_forms,
                  bool with_storages, Known* known) {
  const dlpack::ExchangeApi* const api = exchange_api(capsule);
  if (api == nullptr || api->tensor_from_object == nullptr) return nb::none();
  const Kinds kinds(types);
  if (kinds.known.empty()) throw nb::value_error("no kinds of tensors");
  const Asked version(types[0], "_version"), requires_grad(types[0], "requires_grad"),
      is_neg(types[0], "is_neg"), untyped_storage(types[0], "untyped_storage");
  const size_t count = tensors.size();
  auto addresses = std::make_unique<uint64_t[]>(count);
  auto versions = std::make_unique<int64_t[]>(count);
  std::vector<int64_t> forms;
  if (with_forms) forms.reserve(count * 6);
  nb::list storages;
  for (size_t i = 0; i < count; ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (!kinds.have(tensor)) throw nb::type_error("not one of these kinds of tensors");
    prefetch(tensors, i, kinds);
    dlpack::Tensor seen;
    if (api->tensor_from_object(tensor, &seen) != 0) throw nb::python_error();
    addresses[i] = reinterpret_cast<uintptr_t>(seen.data) + seen.byte_offset;
    if (with_forms) {
      const bool dense = append_form(seen, &forms);
      forms.push_back(requires_grad(tensor).is(nb::handle(Py_True)));
      if (!dense) throw nb::value_error("a tensor is not dense");
      if (known == nullptr || !known->has(i, tensor, addresses[i])) {  // DLPack does not say
        if (is_neg(tensor).is(nb::handle(Py_True))) throw nb::value_error("a tensor is negated");
        if (known != nullptr) known->note(i, tensor, addresses[i]);
      }
    }
    versions[i] = number_of(version(tensor));
    if (with_storages) storages.append(untyped_storage(tensor));
  }
  return nb::make_tuple(as_array(std::move(addresses), count), as_array(std::move(versions), count),
                        nb::bytes(forms.data(), forms.size() * sizeof(int64_t)), storages);
}

nb::object columns(nb::list objects, nb::tuple names, nb::tuple absent, nb::tuple empty) {
  // Nearly all the time is waiting for memory. So some objects are gone through together, a step deeper each
  // time, and what the next step reads is on its way meanwhile.
  constexpr size_t kTogether = 32;
  nb::object kinds = nb::steal(PySet_New(nullptr));
  if (!kinds.is_valid()) throw nb::python_error();
  std::vector<Column> found(names.size());
  const PyTypeObject* latest = nullptr;
  for (size_t begin = 0; begin < objects.size(); begin += kTogether) {
    const size_t end = std::min(begin + kTogether, objects.size());
    // Held: what is asked below may run anything.
    std::vector<nb::object> held, dicts, inner;
    for (size_t i = begin; i < end; ++i) {
      held.push_back(nb::borrow(PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i))));
      prefetch_lines(reinterpret_cast<const char*>(held.back().ptr()) - kLine, 2);
    }
    for (const nb::object& object : held) {
      dicts.push_back(nb::steal(PyObject_GenericGetDict(object.ptr(), nullptr)));
      if (!dicts.back().is_valid()) throw nb::python_error();
      __builtin_prefetch(dicts.back().ptr());
      const PyTypeObject* const kind = Py_TYPE(object.ptr());
      if (kind != latest &&
          PySet_Add(kinds.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))) != 0)
        throw nb::python_error();
      latest = kind;
    }
    for (const nb::object& dict : dicts) prefetch_inside(dict.ptr());
    for (const nb::object& dict : dicts) {
      for (nb::handle name : absent)
        if (found_in(dict, name) != nullptr) return nb::none();
      for (nb::handle name : empty) {
        PyObject* const one = found_in(dict, name);
        if (one == nullptr) throw nb::key_error("no such dictionary");
        inner.push_back(nb::borrow(one));
        __builtin_prefetch(one);
      }
      for (nb::handle name : names) {
        PyObject* const one = found_in(dict, name);
        if (one == nullptr) throw nb::key_error("no such dictionary");
        inner.push_back(nb::borrow(one));
        __builtin_prefetch(one);
      }
    }
    for (const nb::object& one : inner) prefetch_inside(one.ptr());
    size_t place = 0;
    for (size_t object = 0; object < dicts.size(); ++object) {
      for (size_t i = 0; i < empty.size(); ++i)
        if (is_true(inner[place++])) return nb::none();
      for (Column& column : found) column.append(inner[place++]);
    }
  }
  nb::list made;
  for (const Column& column : found) made.append(column.made());
  return nb::make_tuple(kinds, made);
}

}  // namespace asyncckpt

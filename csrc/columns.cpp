#include "columns.h"

#include <algorithm>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace asyncckpt {
namespace {

constexpr size_t kLine = 64;  // of a cache

// Nearly all the time is waiting for memory. So some objects are gone through together, a step deeper each time, and
// what the next step reads is on its way meanwhile.
constexpr size_t kTogether = 32;

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

void append_number(int64_t number, std::string* to) {
  to->append(reinterpret_cast<const char*>(&number), sizeof(number));
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
    } else if (!PyDict_Check(dict.ptr())) {
      throw nb::type_error("not a dictionary");
    } else {  // it may have an order of its own
      const nb::list items = nb::steal<nb::list>(PyMapping_Items(dict.ptr()));
      if (!items.is_valid()) throw nb::python_error();
      length = static_cast<Py_ssize_t>(items.size());
      for (nb::handle item : items) append(item[0].ptr(), item[1].ptr());
    }
    append_number(length, &lengths);
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

nb::object columns(nb::list objects, nb::tuple names, nb::tuple absent, nb::tuple empty) {
  nb::object kinds = nb::steal(PySet_New(nullptr));
  if (!kinds.is_valid()) throw nb::python_error();
  std::vector<Column> found(names.size());
  const PyTypeObject* latest = nullptr;
  std::vector<nb::object> held, dicts, inner;  // held: what is asked below may run anything
  for (size_t begin = 0; begin < objects.size(); begin += kTogether) {
    const size_t end = std::min(begin + kTogether, objects.size());
    held.clear(), dicts.clear(), inner.clear();
    for (size_t i = begin; i < end; ++i) {
      held.push_back(nb::borrow(PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i))));
      // Since python 3.11 the address of its dictionary lies before the object.
      prefetch_lines(
          reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(held.back().ptr()) - kLine), 2);
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

nb::object entries_of(nb::list dicts, nb::handle kind) {
  struct Entry {
    PyObject *key, *value;  // the dictionaries', which nothing here changes
  };
  std::string lengths, are_kind;
  nb::list keys, those, others;
  std::vector<Entry> entries;
  const auto dict_at = [&](size_t index) {
    return PyList_GET_ITEM(dicts.ptr(), static_cast<Py_ssize_t>(index));
  };
  for (size_t begin = 0; begin < dicts.size(); begin += kTogether) {
    const size_t end = std::min(begin + kTogether, dicts.size());
    for (size_t i = begin; i < end; ++i) __builtin_prefetch(dict_at(i));
    for (size_t i = begin; i < end; ++i) {
      if (!PyDict_CheckExact(dict_at(i))) return nb::none();
      prefetch_inside(dict_at(i));
    }
    entries.clear();
    for (size_t i = begin; i < end; ++i) {
      append_number(PyDict_GET_SIZE(dict_at(i)), &lengths);
      Entry entry;
      for (Py_ssize_t place = 0; PyDict_Next(dict_at(i), &place, &entry.key, &entry.value);) {
        __builtin_prefetch(entry.value);
        entries.push_back(entry);
      }
    }
    for (const Entry& entry : entries) {
      const bool is_kind = reinterpret_cast<PyObject*>(Py_TYPE(entry.value)) == kind.ptr();
      are_kind.push_back(is_kind);
      keys.append(nb::handle(entry.key));
      (is_kind ? those : others).append(nb::handle(entry.value));
    }
  }
  return nb::make_tuple(nb::bytes(lengths.data(), lengths.size()), keys,
                        nb::bytes(are_kind.data(), are_kind.size()), those, others);
}

nb::bytes identities(nb::list objects) {
  std::string found;
  for (nb::handle object : objects) append_number(reinterpret_cast<intptr_t>(object.ptr()), &found);
  return nb::bytes(found.data(), found.size());
}

}  // namespace asyncckpt

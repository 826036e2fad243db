// The little of Python that this module needs, in the limited API of Python 3.11 (PEP 384): one compiled file then
// loads into that Python and into every later one. No binding library offers that for 3.11; see
// docs/decisions/0026-one-wheel-for-every-python.md.
//
// A C++ function that Python can call begins with LL_PYTHON, which keeps the names of its parameters, and `define` puts
// it into the module. Its arguments come by position, are converted by the parameters' types, and say by name what is
// wrong with them. An exception becomes Python's: std::invalid_argument a ValueError, std::bad_alloc a MemoryError, any
// other std::exception a RuntimeError.
#pragma once

#include <Python.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace logitless {

// Thrown where Python's own functions failed and have set Python's exception.
struct PythonError {};

// A reference to a Python object, given back at the end of the scope.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {
    if (!owned) throw PythonError{};
  }
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// An argument of any type, which the caller of the function keeps alive.
struct Any {
  PyObject* object = nullptr;
  bool is_none() const { return object == Py_None; }
};

struct Tuple {
  PyObject* object = nullptr;
  Py_ssize_t size() const { return PyTuple_Size(object); }
};

struct Bytes {
  PyObject* object = nullptr;
  Py_ssize_t size() const { return PyBytes_Size(object); }
  char* data() const { return PyBytes_AsString(object); }
};

// What Python calls each type, and its conversion: false where `given` is none, with or without Python's exception set.

template <class T> struct Converted;

template <> struct Converted<std::int64_t> {
  static constexpr const char* kName = "int";
  static bool from(PyObject* given, std::int64_t* value) {
    *value = PyLong_AsLongLong(given);
    return *value != -1 || !PyErr_Occurred();
  }
};

template <> struct Converted<int> {
  static constexpr const char* kName = "int";
  static bool from(PyObject* given, int* value) {
    const long wide = PyLong_AsLong(given);
    *value = static_cast<int>(wide);
    return wide >= INT_MIN && wide <= INT_MAX && (wide != -1 || !PyErr_Occurred());
  }
};

static_assert(std::is_same_v<std::uintptr_t, std::size_t>, "an address is converted as a size");
template <> struct Converted<std::uintptr_t> {
  static constexpr const char* kName = "int";
  static bool from(PyObject* given, std::uintptr_t* value) {
    *value = PyLong_AsSize_t(given);
    return *value != static_cast<std::size_t>(-1) || !PyErr_Occurred();
  }
};

template <> struct Converted<double> {
  static constexpr const char* kName = "float";
  static bool from(PyObject* given, double* value) {
    *value = PyFloat_AsDouble(given);
    return *value != -1 || !PyErr_Occurred();
  }
};

template <> struct Converted<bool> {
  static constexpr const char* kName = "bool";
  static bool from(PyObject* given, bool* value) {
    *value = given == Py_True;
    return *value || given == Py_False;
  }
};

template <> struct Converted<const char*> {
  static constexpr const char* kName = "str";
  static bool from(PyObject* given, const char** value) {
    *value = PyUnicode_Check(given) ? PyUnicode_AsUTF8AndSize(given, nullptr) : nullptr;
    return *value != nullptr;
  }
};

template <> struct Converted<Any> {
  static constexpr const char* kName = "object";
  static bool from(PyObject* given, Any* value) {
    value->object = given;
    return true;
  }
};

template <> struct Converted<Tuple> {
  static constexpr const char* kName = "tuple";
  static bool from(PyObject* given, Tuple* value) {
    value->object = given;
    return PyTuple_Check(given);
  }
};

template <> struct Converted<Bytes> {
  static constexpr const char* kName = "bytes";
  static bool from(PyObject* given, Bytes* value) {
    value->object = given;
    return PyBytes_Check(given);
  }
};

template <> struct Converted<Object> {  // a result only
  static constexpr const char* kName = "object";
};

template <> struct Converted<void> {  // a result only
  static constexpr const char* kName = "None";
};

[[noreturn]] inline void raise_type_error(const std::string& where, const char* expected, PyObject* given) {
  PyErr_Clear();
  PyErr_Format(PyExc_TypeError, "%s: expected %s, got %R", where.c_str(), expected, given);
  throw PythonError{};
}

// Element `index` of a tuple, as T.
template <class T> T element(const Tuple& tuple, Py_ssize_t index) {
  PyObject* const item = PyTuple_GetItem(tuple.object, index);
  if (!item) throw PythonError{};
  T value{};
  if (!Converted<T>::from(item, &value))
    raise_type_error("element " + std::to_string(index) + " of a tuple", Converted<T>::kName, item);
  return value;
}

inline PyObject* to_python(std::int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(std::size_t value) { return PyLong_FromSize_t(value); }
inline PyObject* to_python(int value) { return PyLong_FromLong(value); }
inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(double value) { return PyFloat_FromDouble(value); }
inline PyObject* to_python(const char* value) { return PyUnicode_FromString(value); }
inline PyObject* to_python(Object&& value) { return value.release(); }

template <class... Values> Object make_tuple(Values&&... values) {
  Object tuple(PyTuple_New(sizeof...(Values)));
  Py_ssize_t index = 0;
  (PyTuple_SetItem(tuple.get(), index++, Object(to_python(std::forward<Values>(values))).release()), ...);
  return tuple;
}

// Lets other Python threads run until the end of the scope.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;
  ~GilReleased() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Function as Python calls it.
template <auto Function, class Signature = decltype(Function)> class Exposed;

template <auto Function, class Result, class... Parameters> class Exposed<Function, Result (*)(Parameters...)> {
 public:
  static void add_to(PyObject* module, const char* name, const char* parameters) {
    name_ = name;
    names_ = last_words(parameters);
    // The form from which Python's `inspect` reads names; then the types, for the test of _native.pyi.
    doc_ = name_ + "($module";
    for (const std::string& parameter : names_) doc_ += ", " + parameter;
    doc_ += names_.empty() ? ")\n--\n\n(" : ", /)\n--\n\n(";
    const std::vector<const char*> types{Converted<std::decay_t<Parameters>>::kName...};
    for (std::size_t i = 0; i < types.size(); ++i) doc_ += std::string(i ? ", " : "") + types[i];
    doc_ += std::string(") -> ") + Converted<Result>::kName;
    // METH_FASTCALL: the arguments as an array, without a tuple around them. The cast is how Python's headers ask for
    // it.
    methods_[0] = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
                   doc_.c_str()};
    methods_[1] = {};
    if (PyModule_AddFunctions(module, methods_)) throw PythonError{};
  }

 private:
  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    try {
      if (count != static_cast<Py_ssize_t>(sizeof...(Parameters))) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd positional arguments, got %zd", name_.c_str(),
                     static_cast<Py_ssize_t>(sizeof...(Parameters)), count);
        return nullptr;
      }
      return call_with(given, std::index_sequence_for<Parameters...>());
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <std::size_t... I>
  static PyObject* call_with([[maybe_unused]] PyObject* const* given, std::index_sequence<I...>) {
    std::tuple<std::decay_t<Parameters>...> arguments;
    (convert(given[I], I, &std::get<I>(arguments)), ...);
    if constexpr (std::is_void_v<Result>) {
      Function(std::get<I>(arguments)...);
      return Py_NewRef(Py_None);
    } else {
      return to_python(Function(std::get<I>(arguments)...));
    }
  }

  template <class T> static void convert(PyObject* given, std::size_t index, T* value) {
    if (!Converted<T>::from(given, value)) raise_type_error(name_ + ": " + names_[index], Converted<T>::kName, given);
  }

  // "int dtype, const Tuple& shape" gives dtype and shape.
  static std::vector<std::string> last_words(const std::string& parameters) {
    std::vector<std::string> words;
    for (std::size_t begin = 0; begin < parameters.size();) {
      const std::size_t end = std::min(parameters.find(',', begin), parameters.size());
      const std::size_t space = parameters.find_last_of(" *&", end - 1);
      words.push_back(parameters.substr(space + 1, end - space - 1));
      begin = end + 1;
    }
    return words;
  }

  // Python keeps pointers into these for as long as it runs.
  static inline std::string name_, doc_;
  static inline std::vector<std::string> names_;
  static inline PyMethodDef methods_[2];
};

// Begins the definition of a function that Python can call. No type among the parameters has a comma of its own.
#define LL_PYTHON(Result, name, ...)                    \
  constexpr char name##_parameters[] = "" #__VA_ARGS__; \
  Result name(__VA_ARGS__)

// Puts such a function into the module.
#define LL_DEFINE(module, name) Exposed<&name>::add_to(module, #name, name##_parameters)

}  // namespace logitless

#pragma once

#include "binding/python.h"

void bind_elementwise(PyObject* module);

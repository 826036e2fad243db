#pragma once

#include "binding/python.h"

void bind_pair(PyObject* module);  // the two-row kernels

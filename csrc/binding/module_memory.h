#pragma once

#include "binding/python.h"

void bind_memory(PyObject* module);

#pragma once

#include "binding/python.h"

void bind_search(PyObject* module);

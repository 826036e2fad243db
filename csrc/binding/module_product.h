#pragma once

#include "binding/python.h"

void bind_product(PyObject* module);

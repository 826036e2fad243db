#pragma once
#include "binding/python.h"

void bind_losses(PyObject* module);

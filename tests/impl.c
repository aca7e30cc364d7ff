/* The implementation for the programs that are linked with it. */
#include "impl.h"

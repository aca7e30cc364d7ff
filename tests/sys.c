/* The same with all system calls behind the hooks of sys.h. */
#include "sys.h"

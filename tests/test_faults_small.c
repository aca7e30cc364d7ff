/* The same tests without the shortcuts that -Os leaves out. */
/* build: -DLLMCBI_QUICK=0 */
#include "test_faults.c"

/* The same tests without the shortcuts that -Os leaves out. */
/* build: -DLLMCBI_QUICK=0 -DLLMCB_NO_AGENT */
#include "test_chat.c"

/* The same tests without the shortcuts that -Os leaves out. */
/* build: -DLLMCBI_QUICK=0 -DLLMCB_NO_AGENT -DLLMCB_NO_KIT */
#include "test_chat.c"

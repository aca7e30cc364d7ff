/* The same tests with poll(2) where epoll is the default. */
/* build: -DLLMCB_NO_EPOLL */
#include "test_syscalls.c"

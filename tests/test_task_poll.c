/* The same tests with poll(2) where epoll is the default. */
/* build: -DLLMCB_NO_EPOLL -DLLMCB_NO_AGENT -DLLMCB_NO_SOCKETS */
#include "test_task.c"

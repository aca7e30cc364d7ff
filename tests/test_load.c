/* The small form of load.c, for the gate. */
#define LOAD_AS_TEST
#include "load.c"

TEST(streams_that_break_stall_and_are_cancelled)
{
    unsigned n = load_room(500);

    load_start(n, 20240601, 60);
    load_rounds(2, false);
    load_stop();
}

TEST(rounds_on_one_loop_leave_nothing)
{
    load_start(50, 20240602, 60);
    load_soak(400, false);
    load_stop();
}

int main(int argc, char **argv)
{
    return test_main(argc, argv);
}

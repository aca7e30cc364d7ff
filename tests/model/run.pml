/* The protocol between the loop and its workers, for one run with one sync
 * handler: who tells whom of what, when somebody sleeps, and who wakes him.
 * Names are those of llmcb.h: llmcbi_prepare, _process, _publish,
 * _hear_progress, _run_pump, _strand_run, _worker, llmcb_op_cancel.
 *
 * Events of the run: 1 the start, then TOKENS tokens, then the finish. The
 * mutex is held over whole sections, which nobody can look into, so each is
 * one step (atomic); what is done without it is a step of its own.
 *
 * BREAK_... puts a defect in, to see that it is found: tests/model/check.sh */

#ifndef TOKENS
#define TOKENS 4
#endif
#ifndef WINDOW
#define WINDOW 2
#endif
#define NEVER 99

mtype = { STARTING, OPEN, DRAINING, FINISHING, DONE };

/* Under the mutex. */
bool sleeping, progress_due;
bool queued;      /* the strand is in the pool's list */
bool busy;        /* the cursor is in its strand's list or being run */
bool in_progress; /* the cursor is in the loop's list */
byte done, limit, mark, finish; /* of the cursor, as workers see it */
byte running;     /* n_strands */
byte waiting, woken; /* workers in pthread_cond_wait, and signalled there */
bool napping;     /* a worker will look again by itself */
bool stop;
byte exited;

/* Seen by all. */
bool pipe;          /* there are bytes in the wake-up pipe */
bool cancels, wanted; /* of the loop, of the op */
byte arrived;         /* tokens that the server has sent */
bool cancelling;      /* somebody will cancel, at some time */

/* The loop's own. */
mtype state = STARTING;
byte head = 1, known, fed, told_limit, told_mark = NEVER, my_mark, my_finish;
bool ready = true, on_pool, mute, starved, skipping, outcome, unpublished;
byte least; /* scratch */

/* What the handler has seen. */
byte seen, inside, finishes;

inline wake_sleeper() {
    if
#ifdef BREAK_WAKE
    :: sleeping -> sleeping = false
#else
    :: sleeping -> sleeping = false; pipe = true
#endif
    :: else
    fi
}

inline signal() {
    if
    :: waiting > 0 -> waiting--; woken++
    :: else
    fi
}

/* ---- a worker ---- */

proctype worker() {
    byte at, to, fin;
    bool worked;

again:
    atomic {
        if
        :: queued && running < 1 -> /* one thread is left for blocking work */
            queued = false;
            running++;
            worked = true;
            at = done; to = limit; fin = finish
        :: else ->
            if
            :: stop -> goto leave
            :: else
            fi;
            if
            :: worked && !napping -> worked = false; napping = true; goto nap
            :: else -> worked = false; waiting++
            fi;
            goto wait
        fi
    }
    do
    :: at < to ->
        atomic { /* the handler is entered */
            inside++;
            assert(inside == 1);
            assert(at + 1 > seen);
            assert(finishes == 0);
            assert((at == 0) == (seen == 0));
            seen = at + 1;
            if
            :: at + 1 == fin -> finishes++
            :: else
            fi
        }
        atomic { inside--; at++ }
    :: else -> break
    od;
    atomic {
        done = at;
#ifdef BREAK_BUSY
        busy = true;
#else
        busy = done < limit;
#endif
        if
        :: done < limit -> queued = true
        :: else
        fi;
        in_progress = true;
#ifdef BREAK_MARK
        if
        :: done > mark || (!busy && limit == 0) ->
#else
        if
        :: done >= mark || (!busy && limit == 0) ->
#endif
            progress_due = true;
            wake_sleeper()
        :: else
        fi;
        running--;
        at = 0; to = 0; fin = 0
    }
    goto again;
nap: /* what nobody waits for is only late if it never ends: no BREAK_ here */
    napping = false;
    goto again;
wait:
    atomic { woken > 0 -> woken-- }
    goto again;
leave:
    atomic { exited++; pipe = true }
}

/* ---- the loop ---- */

inline publish() {
    atomic {
        if
        :: unpublished ->
            unpublished = false;
            if
            :: on_pool ->
                told_limit = head; told_mark = my_mark;
                mark = my_mark;
                finish = my_finish;
                limit = (mute || (skipping && !my_finish) -> 0 : head);
                if
                :: busy
                :: !busy && done < limit ->
                    busy = true; queued = true
                :: else -> /* nothing to do: give it back */
                    progress_due = true; in_progress = true
                fi
            :: else
            fi;
#ifndef BREAK_SIGNAL
            if
            :: queued && running < 1 && (my_mark != NEVER || !napping) ->
                signal()
            :: else
            fi
#endif
        :: else
        fi
    }
}

inline set_slowest() {
    least = (mute -> head : known)
}

inline pump() {
    atomic {
        ready = false;
        do
        :: on_pool || done >= head -> break
        :: else ->
            if
#ifdef BREAK_FINISH
            :: skipping ->
#else
            :: skipping && done + 1 != my_finish ->
#endif
                if
                :: done == 0 -> mute = true
                :: else
                fi;
                done = (my_finish && done + 1 != my_finish -> my_finish - 1
                                                           : head);
                known = done
            :: else ->
                if
                :: mute -> done++; known = done
                :: else -> on_pool = true; told_limit = 0
                fi
            fi
        od;
        set_slowest();
        if /* told: resume */
        :: starved && head - least <= WINDOW / 2 -> starved = false
        :: else
        fi;
        if
        :: state == STARTING && outcome ->
            state = DRAINING; ready = true
        :: state == STARTING && !outcome && least == head -> state = OPEN
        :: state == DRAINING && least == head ->
            head++; my_finish = head; state = FINISHING; ready = true
        :: state == FINISHING && least == head -> state = DONE
        :: else
        fi;
        if
        :: state != OPEN -> my_mark = head
        :: state == OPEN && starved ->
            my_mark = (head > WINDOW / 2 -> head - WINDOW / 2 : 0)
        :: else -> my_mark = NEVER
        fi;
        if
#ifdef BREAK_TOLD
        :: on_pool && told_limit != head ->
#else
        :: on_pool && (told_limit != head || told_mark != my_mark) ->
#endif
            unpublished = true
        :: else
        fi
    }
}

/* Data is there, and the transport is not paused. */
#define readable (state == OPEN && !outcome && !starved && fed < arrived)

inline read_data() {
    atomic {
        do
        :: readable ->
            set_slowest();
#ifdef BREAK_WINDOW
            if
            :: head - least <= WINDOW ->
#else
            if
            :: head - least < WINDOW ->
#endif
                head++; fed++; ready = true;
                set_slowest();
                assert(head - least <= WINDOW);
                if
                :: fed == TOKENS ->
                    outcome = true; state = DRAINING
                :: else
                fi
            :: else -> starved = true; ready = true
            fi
        :: else -> break
        od
    }
}

proctype loop() {
    bool wait, was;

    do
    :: state == DONE -> break
    :: else ->
        publish(); /* prepare */
        wait = !ready;
        if
        :: wait && cancels -> wait = false
        :: else
        fi;
        if
        :: wait ->
#ifdef BREAK_SLEEP
            wait = !progress_due; /* unlocks in between */
            if
            :: wait -> sleeping = true
            :: else
            fi
#else
            atomic {
                if
                :: progress_due -> wait = false
                :: else -> sleeping = true
                fi
            }
#endif
        :: else
        fi;
        (pipe || readable || !wait); /* poll */
        pipe = false;
        atomic { /* process */
            sleeping = false;
            progress_due = false;
            was = in_progress && !busy; /* hear_progress */
            if
            :: in_progress ->
                in_progress = false;
                known = done;
                ready = true
            :: else
            fi
        }
        if
        :: cancels ->
#ifdef BREAK_CANCELS
            skip;
#else
            cancels = false;
#endif
            atomic {
                if
                :: wanted ->
                    wanted = false;
                    if
                    :: state == STARTING || state == OPEN ||
                       state == DRAINING ->
                        outcome = true;
                        state = DRAINING;
                        skipping = true;
                        ready = true;
                        if
                        :: on_pool -> unpublished = true
                        :: else
                        fi
                    :: else
                    fi
                :: else
                fi
            }
#ifdef BREAK_CANCELS
            cancels = false
#endif
        :: else
        fi;
        if
        :: was ->
            atomic { /* take_back */
                on_pool = false;
                was = false
            }
        :: else
        fi;
        read_data();
        do
        :: ready -> pump()
        :: else -> break
        od;
        publish()
    od;
    /* the op is done: one finish, if there was a start, and nobody inside */
    assert(!on_pool && inside == 0);
    assert(finishes == (seen > 0 -> 1 : 0));
    assert(skipping || seen == TOKENS + 2);
    atomic { stop = true; woken = woken + waiting; waiting = 0 }
    do
    :: exited == 2 -> break
    :: else -> pipe; pipe = false
    od
}

/* ---- the others ---- */

proctype server() {
    do
    :: arrived < TOKENS -> arrived++
    :: arrived < TOKENS && cancelling -> break /* it falls silent */
    :: arrived == TOKENS -> break
    od
}

proctype canceller() {
    if
    :: cancelling ->
        cancels = true; /* of another op */
        pipe = true;
        /* llmcb_op_cancel */
        wanted = true;
        cancels = true;
#ifndef BREAK_CANCEL
        pipe = true
#endif
    :: else
    fi
}

init {
    atomic {
        if
        :: cancelling = true
        :: cancelling = false
        fi;
        run loop();
        run worker();
        run worker();
        run server();
        run canceller()
    }
}

ltl ends { <> (state == DONE && exited == 2) }

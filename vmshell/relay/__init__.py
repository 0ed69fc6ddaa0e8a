"""The relay: one process per host between every QEMU's console and monitor, the attached shells and the broker.

It runs as its own unprivileged uid, parses what the least trusted processes of the host say, and tells the broker only the
words of `messages.WORDS`. It can be killed and started again at any moment; no VM notices.

    main       starts it: sockets from the service manager or its own, signals
    control    the broker's connection and its four verbs
    vm         one VM: connecting to QEMU, its state, the words about it
    port       the descriptors of its serial port: FIFOs, or a socket of an earlier version's
    console    the guest's bytes: reading, back-pressure, keys
    viewers    who is attached, who may type, how long the VM waits for them; `viewer` is one of them
    old_viewers  sockets of viewers that a relay from before the pipes left behind
    ring       the last 64 KiB, which are the replay and every viewer's queue in one
    logfile    the same bytes on disk, bounded
    stderr     QEMU's own words into a bounded log
    qmp        the monitor of one QEMU, taken as hostile
    orders     what the broker may have QEMU do, step by step
    jobs       the few of it that take long
    words      what the broker hears, at a bounded rate
    loop       epoll, timers and the barrier that keeps one peer's trouble its own
    service    the service manager's notify socket and descriptor store
"""

# Memory that can be told from a fresh start: says "counter ready", then at each key "counter NNNN" (hex), one more each time.
        .set    WANT_GETC, 1
        .set    COUNTER, 0x8000
        .include "prologue.inc"
        mov     word ptr [COUNTER], 0
        mov     si, offset ready
        call    puts
again:  call    getc
        mov     si, offset text
        call    puts
        mov     ax, [COUNTER]
        call    hex16
        call    newline
        inc     word ptr [COUNTER]
        jmp     again
        .include "serial.inc"
ready:  .asciz  "counter ready\r\n"
text:   .asciz  "counter "

# A known text of 10 MiB: the lines "00000000" to "000fffff" (hex) without a pause, then "lines end".
        .set    HIGH, 0x8000
        .include "prologue.inc"
        xor     bx, bx
        mov     [HIGH], bx
again:  mov     ax, [HIGH]
        call    hex16
        mov     ax, bx
        call    hex16
        call    newline
        inc     bx
        jnz     again
        inc     word ptr [HIGH]
        cmp     word ptr [HIGH], 16
        jne     again
        mov     si, offset text
        call    puts
        call    newline
stop:   hlt
        jmp     stop
        .include "serial.inc"
text:   .asciz  "lines end"

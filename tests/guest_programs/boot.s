# Which of several drives was booted: "boot from LABEL DL".
        .include "prologue.inc"
        mov     si, offset text
        call    puts
        mov     si, offset label
        call    puts
        mov     al, ' '
        call    putc
        mov     al, dl
        call    hex8
        call    newline
        cli
1:      hlt
        jmp     1b
        .include "serial.inc"
text:   .asciz  "boot from "
label:                                  # the label follows

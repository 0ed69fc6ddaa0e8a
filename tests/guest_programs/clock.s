# The clock on the board, each time its second changes: "clock YYYY-MM-DD HH:MM:SS".
        .include "prologue.inc"
        mov     bl, 0xff                # the second shown last
wait:   hlt                             # the timer wakes us 18 times a second
        mov     ah, 2
        int     0x1a                    # CH:CL:DH, in BCD
        jc      wait
        cmp     dh, bl
        je      wait
        mov     bl, dh
        push    cx
        push    dx
        mov     ah, 4
        int     0x1a                    # CH CL - DH - DL
        mov     si, offset text
        call    puts
        mov     ax, cx
        call    hex16
        mov     al, '-'
        call    putc
        mov     al, dh
        call    hex8
        mov     al, '-'
        call    putc
        mov     al, dl
        call    hex8
        mov     al, ' '
        call    putc
        pop     dx
        pop     cx
        mov     al, ch
        call    hex8
        mov     al, ':'
        call    putc
        mov     al, cl
        call    hex8
        mov     al, ':'
        call    putc
        mov     al, dh
        call    hex8
        call    newline
        jmp     wait
        .include "serial.inc"
text:   .asciz  "clock "

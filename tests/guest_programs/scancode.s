# The keyboard as the controller hands it out: says "scancode ready", then each byte as "scancode XX" (set 1, as BIOSes set it).
        .include "prologue.inc"
        cli                             # or the BIOS takes the bytes
        mov     si, offset ready
        call    puts
1:      in      al, 0x64
        test    al, 1
        jz      1b
        mov     ah, al
        in      al, 0x60
        test    ah, 0x20                # the mouse's
        jnz     1b
        mov     si, offset text
        push    ax
        call    puts
        pop     ax
        call    hex8
        call    newline
        jmp     1b
        .include "serial.inc"
ready:  .asciz  "scancode ready\r\n"
text:   .asciz  "scancode "

# What the BIOS says of the first hard disk: "geometry CYLINDERS/HEADS/SECTORS" in hex, or "geometry none".
# Cylinders are one less than the drive has: BIOSes keep the last one for themselves.
        .include "prologue.inc"
        mov     si, offset text
        call    puts
        mov     ah, 8
        mov     dl, 0x80
        xor     di, di
        int     0x13
        push    cs
        pop     es                      # the call leaves a pointer there
        jc      none
        mov     ax, cx                  # CH: low bits of the last cylinder, CL: its two high ones and the sectors
        xchg    al, ah
        shr     ah, 6
        inc     ax
        call    hex16
        mov     al, '/'
        call    putc
        mov     al, dh                  # the last head; 256 heads would show as 00
        inc     al
        call    hex8
        mov     al, '/'
        call    putc
        mov     al, cl
        and     al, 0x3f
        call    hex8
        jmp     end
none:   mov     si, offset nothing
        call    puts
end:    call    newline
        cli
1:      hlt
        jmp     1b
        .include "serial.inc"
text:   .asciz  "geometry "
nothing: .asciz "none"

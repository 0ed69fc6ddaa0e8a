# Are there ACPI tables? "acpi no", or "acpi yes FACP APIC …" with the signatures of the tables that the root table (RSDT) lists.
        .include "prologue.inc"
        .set    COPY, 0x8000            # what comes down from beyond the first MiB
        .set    LIST, 0x8200            # the RSDT
        mov     bx, 0xe000              # the pointer to it lies between E0000 and FFFFF, on a paragraph
next:   mov     es, bx
        xor     di, di
        mov     si, offset signature
        mov     cx, 8
        repe    cmpsb
        je      found
        inc     bx
        jnz     next
        mov     si, offset no
        call    puts
        jmp     end

found:  mov     si, offset yes
        call    puts
        mov     eax, es:[16]            # its address
        push    ds
        pop     es
        call    fetch
        mov     si, COPY
        mov     di, LIST
        mov     cx, 128
        rep     movsw
        mov     cx, [LIST + 4]          # its length; 36 bytes of header, then addresses
        sub     cx, 36
        shr     cx, 2
        jz      end
        mov     di, LIST + 36
1:      mov     eax, [di]
        call    fetch
        mov     al, ' '
        call    putc
        mov     byte ptr [COPY + 4], 0
        mov     si, COPY
        call    puts
        add     di, 4
        loop    1b
end:    call    newline
        cli
1:      hlt
        jmp     1b

fetch:  pusha                           # 256 bytes from EAX to COPY
        mov     [from], ax
        shr     eax, 16
        mov     [from + 2], al
        mov     [from + 5], ah
        mov     si, offset table
        mov     cx, 128                 # words
        mov     ah, 0x87
        int     0x15
        popa
        ret

        .include "serial.inc"
        .balign 8
table:  .quad   0, 0                    # descriptors as INT 15 function 87 wants them
        .word   0xffff
from:   .word   0                       # base, its four bytes in two places
        .byte   0, 0x93, 0, 0
        .word   0xffff, COPY
        .byte   0, 0x93, 0, 0
        .quad   0, 0
signature: .ascii "RSD PTR "
yes:    .asciz  "acpi yes"
no:     .asciz  "acpi no"

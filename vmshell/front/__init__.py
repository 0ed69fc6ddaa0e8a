"""The front: the only code that reads from a socket whose other end a user holds. One server, one child for each connection.

main      sockets from the service manager; what children need is imported once; then zygote and server
server    accepts, asks the kernel who it is, hands over to a child and to the broker; never reads a byte, never drops last
zygote    forks children, and holds no user's socket that they could inherit
child     one connection: frames, checks, forwards; its answers back
cage      the limits and the system-call filter that a child locks itself into
"""

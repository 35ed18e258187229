"""Accepting: the next connection of a listening socket, as a descriptor.

One system call, where a socket object and its three further ones are for nothing: a
Connection owns the descriptor.
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport uint16_t


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    cdef struct sockaddr:
        pass
    cdef struct sockaddr_storage:
        uint16_t ss_family
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    enum:
        SOCK_CLOEXEC
        SOCK_NONBLOCK

cdef extern from "<netinet/in.h>" nogil:
    cdef struct sockaddr_in:
        uint16_t sin_port  # the same bytes as of sockaddr_in6
    uint16_t ntohs(uint16_t number)

cdef extern from "<netdb.h>" nogil:
    int getnameinfo(
        const sockaddr* address, socklen_t size, char* host, socklen_t host_size,
        char* service, socklen_t service_size, int flags,
    )
    enum:
        NI_MAXHOST
        NI_NUMERICHOST


def accept(int listening):
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    cdef char host[NI_MAXHOST]
    cdef int fd = accept4(
        listening, <sockaddr*> &peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC
    )
    if fd < 0:
        if errno in (EAGAIN, EINTR, ECONNABORTED):
            return None
        raise OSError(errno, "accept")
    host[0] = 0
    getnameinfo(<sockaddr*> &peer, size, host, NI_MAXHOST, NULL, 0, NI_NUMERICHOST)
    return fd, host.decode("ascii"), ntohs((<sockaddr_in*> &peer).sin_port)

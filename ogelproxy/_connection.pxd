from ogelproxy._reactor cimport Descriptor


cdef class Connection(Descriptor):
    cdef public object stepper     # resumes who waits for more, where no task does
    cdef object reader             # MORE, or future, of who wants more bytes

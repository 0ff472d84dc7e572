"""The benchmark: ``metalloid bench``, or ``python -m metalloid.bench``.

The driver (``__main__``) lets one process for each implementation time the cases of ``cases`` in turn, so that what
disturbs the machine disturbs all of them alike, and no thread pool runs while another is timed. ``worker`` is such a
process around the libraries of ``peers``; the C command is one too. ``report`` makes the table, ``plot`` the picture.
"""

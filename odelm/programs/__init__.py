"""The programs, one in each module: what is typed in, what is called, what is told.

`main(arguments)` of each returns the exit status; `odelm.programs.launch` runs it as a process of its own.
"""

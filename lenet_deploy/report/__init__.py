"""Records to tables, tables to text: pure functions; the only place where units are converted for people."""

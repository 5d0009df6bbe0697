"""Pages for people: one a session, one a subject with several sessions, one for the group."""

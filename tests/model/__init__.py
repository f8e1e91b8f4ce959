"""The coordinator under random schedules, in virtual time, beside an engine in memory that keeps SGLang's rules."""

"""Token weaving of compiled graphs: what is asked for, what is divided and chosen, and what runs it."""

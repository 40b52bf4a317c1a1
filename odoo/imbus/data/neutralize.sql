-- The copy is to run none of the original's jobs and schedules. What imbus has touched since Odoo's transaction began, that
-- transaction cannot change: a job does it, after its end.
DO $$
DECLARE
    job bigint;
    schedule text;
BEGIN
    IF to_regprocedure('ir_async_unschedule(text)') IS NULL THEN
        RETURN; -- no extension, or not where the add-on looks for it
    END IF;
    -- The jobs first: those that are enqueued here are not meant.
    FOR job IN SELECT id FROM ir_async WHERE state IN ('created', 'processing') AND pg_has_role(role, 'USAGE') LOOP
        BEGIN
            PERFORM ir_async_cancel(job);
        EXCEPTION WHEN serialization_failure THEN
            PERFORM ir_async_call('ir_async_cancel', jsonb_build_array(job));
        END;
    END LOOP;
    FOR schedule IN SELECT name FROM imbus_schedule WHERE role IS NULL OR pg_has_role(role, 'USAGE') LOOP
        BEGIN
            PERFORM ir_async_unschedule(schedule);
        EXCEPTION WHEN serialization_failure THEN
            PERFORM ir_async_call('ir_async_unschedule', jsonb_build_array(schedule));
        END;
    END LOOP;
END $$;

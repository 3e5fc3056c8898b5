/* Threads that turn jobs (batches) into pixels without the Python interpreter.
 *
 * Each thread takes the next row of the first job in the queue. A slow image therefore delays no
 * other thread, and the end of one batch overlaps with the start of the next. The pixels of a row
 * do not depend on the thread that makes them. rsb.h documents the functions.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "rsb.h"

#define NANOSECONDS_PER_MILLISECOND 1000000L
#define NANOSECONDS_PER_SECOND 1000000000L

struct rsb_pool {
    pthread_mutex_t lock;    /* of everything below but `joined` and `threads`, and of the jobs */
    pthread_mutex_t joining; /* of `joined` */
    pthread_cond_t work;     /* a job was submitted, or the pool stops */
    pthread_cond_t finished; /* a job is done, or the pool stops */
    rsb_job *first, *last;   /* queue of the jobs that have rows which no thread has taken */
    uint64_t rows_done;      /* of all jobs since the pool was made */
    int stopping;
    int joined, count; /* threads */
    pthread_t threads[];
};

/* The draws of a row. */
static const void *draws_of(const rsb_step *step, int row) {
    return step->draws + row * step->stride;
}

/* Writes the time to element `which` of the row's times, if they are wanted. */
static void note_time(const rsb_job *job, int row, int which) {
    if (!job->times) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    job->times[(int64_t)row * (job->num_steps + 3) + which] =
        (int64_t)now.tv_sec * NANOSECONDS_PER_SECOND + now.tv_nsec;
}

static int run_steps(const rsb_job *job, int row, uint8_t *image, rsb_scratch *scratch) {
    int status = RSB_OK;
    for (int i = 0; i < job->num_steps && status == RSB_OK; i++) {
        status = job->steps[i].kernel(image, job->height, job->width, draws_of(&job->steps[i], row),
                                      scratch);
        note_time(job, row, i + 2);
    }
    return status;
}

/* Packs a row, after a check of the layers that the device will apply. Sets `*image` where the
 * steps must be run here. */
static int pack_row(const rsb_job *job, int row, uint8_t **image, rsb_scratch *scratch) {
    for (int i = 0; i < job->num_steps; i++) {
        int status = rsb_check_layer(draws_of(&job->steps[i], row));
        if (status) return status;
    }
    return rsb_pack(job->samples + row, job->slab, row, job->height, job->width, scratch, image);
}

static int run_row(const rsb_job *job, int row, rsb_scratch *scratch) {
    uint8_t *image = NULL;
    int status;
    if (!scratch) return RSB_NO_MEMORY;
    if (job->times) job->times[(int64_t)(row + 1) * (job->num_steps + 3) - 1] = gettid();
    note_time(job, row, 0);
    if (job->slab)
        status = pack_row(job, row, &image, scratch);
    else {
        image = job->out + (size_t)row * job->height * job->width * 3;
        status = job->decoder(job->samples + row, image, job->height, job->width, scratch);
    }
    note_time(job, row, 1);
    return status || !image ? status : run_steps(job, row, image, scratch);
}

/* Takes the next row of the first job, which leaves the queue with its last row. */
static int take_row(rsb_pool *pool, rsb_job *job) {
    int row = job->next++;
    if (job->next == job->rows) {
        pool->first = job->after;
        if (!pool->first) pool->last = NULL;
    }
    job->status[row] = RSB_RUNNING;
    return row;
}

static void *worker(void *argument) {
    rsb_pool *pool = argument;
    rsb_scratch *scratch = rsb_scratch_new();
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->first && !pool->stopping) pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->stopping) break;
        rsb_job *job = pool->first;
        int row = take_row(pool, job);
        pthread_mutex_unlock(&pool->lock);
        int status = run_row(job, row, scratch);
        pthread_mutex_lock(&pool->lock);
        job->status[row] = status;
        pool->rows_done++;
        if (++job->done == job->rows) pthread_cond_broadcast(&pool->finished);
    }
    pthread_mutex_unlock(&pool->lock);
    if (scratch) rsb_scratch_free(scratch);
    return NULL;
}

void rsb_pool_stop(rsb_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_cond_broadcast(&pool->finished);
    pthread_mutex_unlock(&pool->lock);
    /* A second caller waits here until all threads have ended. */
    pthread_mutex_lock(&pool->joining);
    for (; pool->joined < pool->count; pool->joined++)
        pthread_join(pool->threads[pool->joined], NULL);
    pthread_mutex_unlock(&pool->joining);
}

void rsb_pool_free(rsb_pool *pool) {
    rsb_pool_stop(pool);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->finished);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->joining);
    free(pool);
}

rsb_pool *rsb_pool_new(int threads) {
    rsb_pool *pool = calloc(1, sizeof *pool + threads * sizeof *pool->threads);
    if (!pool) return NULL;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_mutex_init(&pool->joining, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, &monotonic);
    pthread_condattr_destroy(&monotonic);
    for (; pool->count < threads; pool->count++)
        if (pthread_create(&pool->threads[pool->count], NULL, worker, pool)) {
            rsb_pool_free(pool);
            return NULL;
        }
    return pool;
}

void rsb_pool_submit(rsb_pool *pool, rsb_job *job, int urgent) {
    job->next = 0;
    job->done = 0;
    job->after = NULL;
    if (!job->rows) return;
    for (int i = 0; i < job->rows; i++) job->status[i] = RSB_WAITING;
    pthread_mutex_lock(&pool->lock);
    if (urgent) {
        job->after = pool->first;
        pool->first = job;
        if (!pool->last) pool->last = job;
    } else {
        *(pool->last ? &pool->last->after : &pool->first) = job;
        pool->last = job;
    }
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

static struct timespec deadline(int milliseconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * NANOSECONDS_PER_MILLISECOND;
    if (until.tv_nsec >= NANOSECONDS_PER_SECOND) {
        until.tv_sec++;
        until.tv_nsec -= NANOSECONDS_PER_SECOND;
    }
    return until;
}

int rsb_pool_wait(rsb_pool *pool, rsb_job *job, int milliseconds) {
    struct timespec until = deadline(milliseconds);
    pthread_mutex_lock(&pool->lock);
    while (job->done < job->rows && !pool->stopping &&
           pthread_cond_timedwait(&pool->finished, &pool->lock, &until) != ETIMEDOUT) {}
    int left = pool->stopping ? -1 : job->rows - job->done;
    pthread_mutex_unlock(&pool->lock);
    return left;
}

uint64_t rsb_pool_progress(rsb_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    uint64_t done = pool->rows_done;
    pthread_mutex_unlock(&pool->lock);
    return done;
}

void rsb_pool_cancel(rsb_pool *pool, rsb_job *job) {
    pthread_mutex_lock(&pool->lock);
    rsb_job *before = NULL;
    for (rsb_job *at = pool->first; at; before = at, at = at->after)
        if (at == job) {
            *(before ? &before->after : &pool->first) = job->after;
            if (pool->last == job) pool->last = before;
            job->rows = job->next;
            break;
        }
    pthread_mutex_unlock(&pool->lock);
}
